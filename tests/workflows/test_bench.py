"""``bench``: every phase with both sides, figures that follow from the samples, a report, and a verdict."""

import json
import statistics

import pytest
import torch

import helpers
from sparse_rt.benchmarking.rendering import row_name, where_sparse_loses
from sparse_rt.benchmarking.rows import Row
from sparse_rt.config import ASKED_PHASES, BENCH_PHASES, BenchOptions
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.report import bar_chart, duration, markdown_table, quantity, size
from sparse_rt.workflows.bench import bench, judge, table_rows

SHORT = dict(prompt_tokens=8, new_tokens=3, train_tokens=8)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Heads of 32: vLLM's attention on a CPU takes no smaller ones."""
    return helpers.tiny_llama(tmp_path_factory.mktemp("bench") / "dense", num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    return helpers.compress_folder(dense, tmp_path_factory.mktemp("bench") / "sparse", "unstructured", 0.75)


@pytest.fixture(scope="module")
def whole_run(sparse, tmp_path_factory):
    """Everything the hf engine measures against the decompressed baseline, with a report."""
    report = tmp_path_factory.mktemp("bench") / "report"
    options = BenchOptions(model=str(sparse), repeats=1, batch=[1, 2], report=report, **SHORT)
    return bench(options), report


def quick(model, baseline, **changes):
    """Prefill alone: no fresh process."""
    fields = dict(model=str(model), baseline=str(baseline), phase=["prefill"], repeats=1, **SHORT) | changes
    return bench(BenchOptions.build(**fields))


def rows_of(result, phase):
    return [row for row in result["rows"] if row["phase"] == phase]


def test_every_phase_has_both_sides(whole_run):
    result, _ = whole_run
    assert {row["phase"] for row in result["rows"]} == set(BENCH_PHASES) - set(ASKED_PHASES)
    for row in result["rows"]:
        assert len(row["dense"]["samples"]) == len(row["sparse"]["samples"]) == 1
        assert all(sample > 0 for side in ("dense", "sparse") for sample in row[side]["samples"]), row
    assert [row["batch"] for row in rows_of(result, "decode")] == [1, 2]
    assert result["baseline_kind"] == "decompressed" and result["sparsity"] == pytest.approx(0.75, abs=0.01)


def test_sizes_are_those_of_the_files_and_parameters(whole_run, sparse, dense):
    result, _ = whole_run
    (disk,) = rows_of(result, "disk")
    assert disk["sparse"]["median"] == sum(file.stat().st_size for file in sparse.glob("*.safetensors"))
    dense_bytes = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    assert disk["dense"]["median"] == pytest.approx(dense_bytes, rel=0.01)
    tensors = next(row for row in rows_of(result, "memory") if row["what"] == "tensors of the model")
    saved = tensors["dense"]["median"] - tensors["sparse"]["median"]
    in_layers = 2 * 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160)  # bytes of the linear layers in bfloat16
    # The layout that a processor with native kernels runs from is padded, which shows in layers as small as these.
    assert in_layers * 0.3 < saved <= in_layers * (0.75 - 1 / 16) * 1.01


def test_the_training_step_compares_adapters_of_one_size(whole_run):
    (row,) = rows_of(whole_run[0], "train")
    assert "SPP" in row["note"] and "LoRA" in row["note"]
    counts = [int(part.split()[-1]) for part in row["note"].split(" parameters")[:2]]
    assert 0.5 < counts[0] / counts[1] < 2
    (peak,) = [row for row in rows_of(whole_run[0], "memory") if row["what"] == "process at its peak in training"]
    assert min(peak["dense"]["median"], peak["sparse"]["median"]) > 1e8  # Python and torch alone are more


def test_the_report_holds_the_numbers_of_the_result(whole_run):
    result, report = whole_run
    assert json.loads((report / "report.json").read_text()) == json.loads(json.dumps(result, default=str))
    markdown = (report / "report.md").read_text()
    for cells in table_rows(result):
        assert " | ".join(str(cell) for cell in cells) in markdown
    assert result["slower"] in markdown and result["machine"]["cpu"] in markdown
    assert (report / "report.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_follow_from_the_pairs(sparse, dense):
    result = quick(sparse, dense, phase=["prefill", "decode"], repeats=3)
    assert [row["phase"] for row in result["rows"]] == ["prefill", "decode"]
    for row in result["rows"]:
        slow, fast = row["dense"]["samples"], row["sparse"]["samples"]
        ratios = [a / b for a, b in zip(slow, fast, strict=True)]
        assert row["ratio"]["samples"] == ratios and row["ratio"]["median"] == statistics.median(ratios)
        assert row["dense"]["median"] == statistics.median(slow) and row["dense"]["max"] == max(slow)
        tokens = 8 if row["phase"] == "prefill" else 1
        assert row["tokens_per_second"]["sparse"] == pytest.approx(tokens / statistics.median(fast))


def test_fail_below_reports_first_and_then_fails(sparse, dense, tmp_path):
    with pytest.raises(CheckFailed, match="hf prefill, batch 1") as failure:
        quick(sparse, dense, fail_below=1000.0, report=tmp_path / "report")
    assert failure.value.exit_code == 3 and failure.value.result["below"]
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["fail_below"] == 1000.0 and written["below"] == failure.value.result["below"]


def test_a_low_threshold_passes(sparse, dense):
    assert quick(sparse, dense, fail_below=0.0001)["below"] == []


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(phase=["speed"]), "'disk', 'load', 'memory', 'prefill', 'decode', 'train' or 'serve'"),
        (dict(engine=["tensorrt"]), "'hf', 'vllm' or 'onnx'"),
        (dict(batch=[0]), "at least 1"),
        (dict(prompt_tokens=250, new_tokens=20), "256 positions"),
        (dict(phase=["disk"], fail_below=1.0), "--fail-below judges prefill, decode, train"),
        (dict(phase=["train"], engine=["onnx"]), "measures train; add --engine hf"),
        (dict(phase=["serve"], engine=["hf", "onnx"]), "measures serve; add --engine vllm"),
        (dict(phase=["serve"], engine=["vllm"], prompt_tokens=250, new_tokens=20), "256 positions"),
        (dict(request_rate=[4.0, 0.0]), "above 0, or inf"),
        (dict(request_rate=[float("nan")]), "above 0, or inf"),
    ],
)
def test_bad_requests_say_what_is_allowed(sparse, dense, changes, message):
    with pytest.raises(UserError, match=message):
        quick(sparse, dense, **changes)


def test_models_that_cannot_be_compared_are_refused(sparse, dense, tmp_path):
    with pytest.raises(UserError, match="is dense.*sparse-rt convert"):
        quick(dense, dense)
    with pytest.raises(UserError, match="is compressed"):
        quick(sparse, sparse)
    wider = helpers.tiny_llama(tmp_path / "wider", hidden_size=128)
    with pytest.raises(UserError, match="hidden_size 128, the model has 64"):
        quick(sparse, wider)
    other = helpers.tiny_model(tmp_path / "other", "mistral")
    with pytest.raises(UserError, match="model_type 'mistral', the model has 'llama'"):
        quick(sparse, other)


def test_a_missing_engine_names_its_extra(sparse, dense, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)  # what an import finds when it is not installed
    with pytest.raises(UserError, match=r'pip install "sparse-rt\[vllm\]"'):
        quick(sparse, dense, engine=["vllm"])


def test_a_report_folder_is_not_overwritten_by_accident(sparse, dense, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        quick(sparse, dense, report=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_the_sentence_names_losing_rows_only():
    def row(dense, sparse, unit="s", batch=1):
        return Row("hf", "decode", "step", unit, dense, sparse, batch=batch).to_dict()

    rows = [
        row([2.0, 2.0], [1.0, 1.0]),
        row([1.0, 1.0], [2.0, 2.0], batch=4),
        row([1.0, 3.0, 1.0], [2.0, 2.0, 2.0], batch=8),
    ]
    sentence = where_sparse_loses(rows)
    assert "batch 4 (0.50x)" in sentence and "batch 8 (0.50x, but not in every pair)" in sentence
    assert "batch 1 " not in sentence and "larger" not in sentence
    assert "larger" in where_sparse_loses([row([1.0], [2.0], unit="bytes")])
    assert "neither slower nor larger" in where_sparse_loses(rows[:1])


def test_rows_of_other_models_name_them():
    against = ("int4 MatMulNBits", "sparse int8")
    rows = [
        Row("onnx", "decode", "step", "s", [1.0], [2.0], batch=1),
        Row("onnx", "decode", "step", "s", [1.0], [4.0], batch=1, models=against),
        Row("onnx", "disk", "exported model", "bytes", [1.0], [4.0], models=against),
    ]
    described = [row.to_dict() for row in rows]
    assert described[0]["models"] == {"dense": "dense", "sparse": "sparse"} and described[0]["what"] == "step"
    assert described[1]["models"] == {"dense": "int4 MatMulNBits", "sparse": "sparse int8"}
    assert [row_name(row) for row in described] == [
        "onnx decode, batch 1",
        "onnx decode, batch 1, sparse int8 against int4 MatMulNBits",
        "onnx disk, exported model, sparse int8 against int4 MatMulNBits",
    ]
    assert where_sparse_loses(described) == (
        "Sparse is slower than dense here: onnx decode, batch 1 (0.50x). "
        "Sparse int8 is slower than int4 MatMulNBits here: onnx decode, batch 1 (0.25x). "
        "Sparse int8 is larger than int4 MatMulNBits here: onnx disk, exported model (0.25x)."
    )
    result = {"rows": described}
    judge(result, 1.0)
    assert result["below"] == ["onnx decode, batch 1 0.50x"]


def test_a_chart_with_one_long_bar(tmp_path):
    for index, values in enumerate(([1.0, 0.5, 2.0], [1.0, 0.5, 60.0])):
        bar_chart(tmp_path / f"{index}.png", list("abc"), values, "title", "ratio", reference=1.0)
        assert (tmp_path / f"{index}.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_written_for_people():
    assert (size(999), size(1.2e6), size(5e13)) == ("999 B", "1.2 MB", "50.0 TB")
    assert (duration(0.0000021), duration(0.0123), duration(123.4)) == ("2.10 us", "12.3 ms", "123 s")
    assert quantity(1234.0, "") == "1,234"
    assert markdown_table(["a", "b>"], [("x|y", 1)]).splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]


@pytest.mark.slow
def test_vllm_measures_both_sides(sparse, dense):
    pytest.importorskip("vllm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread each: with more, vLLM binds them to cores that other work may be using
    try:
        # Enough tokens that a step can be told from the noise of a busy machine.
        result = quick(sparse, dense, engine=["vllm"], phase=[], repeats=2, new_tokens=32)
    finally:
        torch.set_num_threads(threads)
    measured = {row["phase"]: row for row in result["rows"] if row["engine"] == "vllm"}
    assert set(measured) == {"load", "memory", "prefill", "decode"}
    for row in measured.values():
        assert row["dense"]["median"] > 0 and row["sparse"]["median"] > 0
    assert len(measured["decode"]["ratio"]["samples"]) == 2
    assert (
        len(measured["load"]["ratio"]["samples"]) == 1
    )  # half a minute each: all repetitions use the same two engines
    assert result["engines"]["vllm"]["dense_linear"]
