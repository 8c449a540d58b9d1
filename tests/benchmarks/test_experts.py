"""The benchmark of experts: a complete row per way to prune, and wrong results are never timed."""

import json
import sys

import experts
import pytest
import torch
from click.testing import CliRunner

from sparse_rt.kernels.native import library

pytestmark = pytest.mark.skipif(library.unavailable_reason() is not None, reason="no native kernels here")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*options):
    usual = ("--model", "tiny", "--tokens", "1", "--tokens", "5", "--threads", "1", "--seconds", "0")
    return CliRunner().invoke(experts.main, [*usual, *options])


def test_every_way_to_prune_becomes_a_complete_row(tmp_path):
    output = tmp_path / "rows.jsonl"
    done = run("--output", str(output))
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["tokens"], f"{row['pattern']} {row['sparsity']}") for row in rows] == [
        (tokens, cell) for tokens in (1, 5) for cell in ("unstructured 0.5", "unstructured 0.75", "2:4 0.5")
    ]
    for row in rows:
        (dense,) = set(row["ms"]) - {"experts", "one_by_one"}
        assert dense in ("vllm", "torch") and row["rms"] < experts.MAX_RMS
        assert all(0 < ms["p10"] <= ms["median"] <= ms["p90"] for ms in row["ms"].values())
        assert row["ratio_one_by_one"]["median"] > 0 and row[f"ratio_{dense}"]["median"] > 0
        assert row["bytes"]["dense"] == 4 * 3 * 64 * 96 * 2 and row["experts"] == 4 and row["isa"] and row["date"]


def test_without_vllm_the_dense_column_is_that_of_torch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    done = run("--cell", "2:4", "--output", str(tmp_path / "rows.jsonl"))
    assert done.exit_code == 0, done.output
    assert all("torch" in json.loads(line)["ms"] for line in (tmp_path / "rows.jsonl").read_text().splitlines())


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = experts.moe.packed_experts
    monkeypatch.setattr(experts.moe, "packed_experts", lambda *arguments: right(*arguments) * 1.05)
    done = run("--cell", "2:4")
    assert done.exit_code != 0 and "experts 2:4: the relative RMS error is" in done.output and '"ms"' not in done.output
