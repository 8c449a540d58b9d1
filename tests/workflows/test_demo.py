"""The whole road on the shipped model, as `make demo` walks it (fewer fine-tuning steps; vLLM has its own tests)."""

import pytest

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import DemoOptions
from sparse_rt.errors import UserError
from sparse_rt.workflows.demo import demo


@pytest.mark.slow
def test_the_whole_road_ends_in_one_table(tmp_path):
    result = demo(DemoOptions(output_dir=tmp_path / "demo", steps=4, skip=["vllm"]))
    rows = {row["model"]: row for row in result["models"]}
    assert list(rows) == ["dense", "pruned 2:4", "pruned 50% unstructured", "2:4 + SPP adapter", "2:4 merged"]
    dense, pruned = rows["dense"]["perplexity"], rows["pruned 2:4"]["perplexity"]
    assert dense < 20 and pruned > 1.1 * dense, "pruning must hurt visibly"
    assert rows["2:4 + SPP adapter"]["perplexity"] < pruned, "fine-tuning must repair"
    assert rows["2:4 merged"]["perplexity"] == pytest.approx(rows["2:4 + SPP adapter"]["perplexity"], rel=0.01)
    assert rows["2:4 merged"]["bytes"] < 0.7 * rows["dense"]["bytes"]
    assert ["masks after the merge", "identical in 35 of 35 weights"] in result["summary"]
    assert result["checks"]["onnx"]["check"]["greedy_equal"] == result["checks"]["onnx"]["check"]["greedy_tokens"]

    text = (tmp_path / "demo" / "report.md").read_text()
    assert f"{rows['2:4 merged']['perplexity']:.2f}" in text and "ONNX Runtime" in text
    merged, base = (Checkpoint.open(tmp_path / "demo" / name) for name in ("merged", "2of4"))
    assert merged.weights.keys() == base.weights.keys() and result["total_seconds"] > 0


def test_unknown_stage_to_skip_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="allowed are vllm, onnx"):
        demo(DemoOptions(output_dir=tmp_path / "demo", skip=["merge"]))
    assert list(tmp_path.iterdir()) == []
