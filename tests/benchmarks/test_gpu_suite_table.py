"""The dispatch table that comes out of measurements: only what was won, only as far as it was measured."""

import json

import gpu_suite_table as tables
import pytest
import torch

from sparse_rt.kernels.triton import configs, dispatch
from sparse_rt.workflows.environment import gpu_dispatch

SMALL, LARGE = (1024, 4096), (14336, 4096)


def row(path, tokens, won, pattern="2:4", sparsity=0.5, shape=LARGE, kind="decode", **more):
    m, n = shape
    gain = won if isinstance(won, float) else (1.5 if won else 0.7)
    ratio = {"p10": gain - 0.1, "median": gain, "p90": gain + 0.1}
    cell = {"pattern": pattern, "sparsity": sparsity, "m": m, "n": n, "tokens": tokens}
    return {"kind": kind, "path": path, **cell, "scratch_ratio": ratio, "us": {"sparse": {"median": 10.0}}, **more}


def rows_of(rows, kernel, **options):
    content = tables.table([{"kind": "environment", "gpu": "NVIDIA H200", "triton": "3.6.0"}, *rows], **options)
    assert dispatch.problems(content) == []
    found = content["dispatch"][kernel]
    assert all(rows == [{"tokens": 0}] for name, rows in content["dispatch"].items() if name not in (kernel, "mma_sp"))
    return [] if found == [{"tokens": 0}] else found


def test_a_limit_is_the_last_number_of_tokens_before_the_first_loss():
    def limit(*results):
        rows = [row("d4", tokens, won, "unstructured", 0.7) for tokens, won in zip((1, 4, 8, 16), results, strict=True)]
        return [(found["tokens"], found["sparsity"], "from" in found) for found in rows_of(rows, "d4")]

    assert limit(True, True, True, True) == [(16, 0.69, False)]
    assert limit(True, True, False, True) == [(4, 0.69, False)]
    assert limit(False, True, True, True) == []
    assert limit(True, 1.05, True, True) == [(1, 0.69, False)], "faster in nine of ten turns, not on average"


def test_small_weights_have_limits_of_their_own_and_unmeasured_sizes_none():
    rows = [row("mma_sp", tokens, True) for tokens in (1, 8, 16)]
    rows += [row("mma_sp", 1, True, shape=SMALL), row("mma_sp", 8, False, shape=SMALL)]
    large, small = LARGE[0] * LARGE[1], SMALL[0] * SMALL[1]
    assert rows_of(rows, "mma_sp") == [
        {"pattern": "2:4", "weights": large, "tokens": 16},
        {"pattern": "2:4", "weights": small, "tokens": 1},
    ]


def test_rows_that_failed_their_check_count_for_nothing():
    rows = [row("d4", 1, True, "unstructured", 0.9, error="relative RMS error")]
    assert rows_of(rows, "d4") == [] == rows_of([], "d4")


def test_gradients_come_from_training_steps():
    rows = [row("spp", tokens, tokens > 512, kind="cost") for tokens in (512, 2048, 8192)]
    (found,) = rows_of(rows, "factors_grad")
    assert (found["from"], found["tokens"]) == (2048, 8192)


def library(decode, prefill, other=None, second_form=True):
    rows = [row("cslt", tokens, decode) for tokens in (1, 16)]
    rows += [row("cslt", tokens, prefill, kind="prefill") for tokens in (512, 2048, 8192)]
    if other is not None:
        rows += [row("mma_sp", tokens, True, us={"sparse": {"median": other}}) for tokens in (1, 16)]
    return rows_of(rows, "cslt", second_form=second_form)


def test_cusparselt_replaces_the_other_forms_or_is_a_second_one_or_is_not_used():
    weights = LARGE[0] * LARGE[1]
    assert library(True, True) == [{"pattern": "2:4", "weights": weights, "tokens": None, "replaces": True}]
    assert library(True, True, other=12.0)[0]["replaces"]
    beside = [{"pattern": "2:4", "weights": weights, "tokens": 8192, "from": 512, "replaces": False}]
    assert library(True, True, other=5.0) == beside == library(False, True)
    assert library(False, True, second_form=False) == [], "more memory than dense only for those who ask for it"
    assert library(True, True, second_form=False)[0]["replaces"]
    assert library(False, 1.12) == [], "a second form of the weight for little"
    assert library(False, False) == []


def test_the_file_is_read_back_by_the_dispatch(tmp_path, monkeypatch):
    rows = [{"kind": "environment", "gpu": "NVIDIA H200", "packages": {"torch": "2.11.0"}}]
    rows += [row("d4", 1, True, "unstructured", 0.5), row("d4", 1, True, "unstructured", 0.9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables.main([str(tmp_path / "rows.jsonl"), "--install"])
    file = tmp_path / "nvidia_h200.json"
    assert json.loads(file.read_text())["measured"]["torch"] == "2.11.0"
    monkeypatch.setenv(dispatch.VARIABLE, str(file))
    dispatch._limits.cache_clear()
    for sparsity, wanted in ((0.45, "never"), (0.5, "1 to 1 tokens"), (0.95, "1 to 1 tokens")):
        assert str(dispatch.limits("d4", "unstructured", *LARGE, sparsity, torch.bfloat16)) == wanted
    assert dispatch.limits("d4", "unstructured", *SMALL, 0.9, torch.bfloat16).never


def test_what_was_measured_of_experts_is_said_and_decides_nothing(tmp_path, monkeypatch):
    rows = [{"kind": "environment", "gpu": "NVIDIA H200"}]
    for ratio in (0.5, 2.0, 8.0):
        rows.append({"kind": "experts", "path": "experts", "us": {}, "ratio": {"median": ratio}})
    rows.append({"kind": "experts", "path": "experts", "error": "relative RMS error"})
    said = "time of dense experts / time of compressed ones 2.00 (0.50 to 8.00; 3 layers and numbers of tokens)"
    monkeypatch.setenv(dispatch.VARIABLE, str(tables.write(rows, tmp_path)))
    assert dispatch.measured()["experts"] == said == gpu_dispatch()["always_used"]["experts"]
    assert "experts" not in tables.table(rows)["dispatch"]
    assert "experts" not in tables.table(rows[:1])["measured"]


@pytest.mark.parametrize("name", configs.files())
def test_shipped_files_hold_what_the_suite_writes(name):
    assert set(configs.read(name)["dispatch"]) == set(dispatch.KERNELS)
