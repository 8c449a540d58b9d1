"""The training benchmark writes complete rows, and its columns compute what they say."""

import json

import cpu_training
import pytest
import torch
from click.testing import CliRunner


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("cell", cpu_training.CELLS)
def test_rows(tmp_path, cell):
    output = tmp_path / "rows.jsonl"
    options = ["--shape", "48x64", "--tokens", "3", "--tokens", "5", "--threads", "1", "--threads", "2"]
    done = CliRunner().invoke(
        cpu_training.main, [*options, "--cell", cell, "--seconds-per-row", "0", "--output", str(output)]
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["tokens"], row["threads"]) for row in rows] == [(3, 1), (3, 2), (5, 1), (5, 2)]
    for row in rows:
        assert {"lora", "full", "spp", "forward", "dx", "values_grad"} <= set(row["ms"])
        assert {"lora / spp", "full / spp"} <= set(row["ratio"])
        assert all(0 < times["p10"] <= times["median"] <= times["p90"] for times in row["ms"].values())
        assert row["commit"] and row["processor"] and row["turns"] == cpu_training.MIN_TURNS


@pytest.mark.parametrize("cell, kept", [("2:4", 0.5), ("unstructured:0.75", 0.25)])
def test_the_sparse_layer_is_as_sparse_as_it_says(cell, kept):
    layer = cpu_training.spp_layer(torch.randn(48, 64), cell)
    assert layer.base_layer.nnz == 48 * 64 * kept
