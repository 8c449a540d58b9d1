"""The GPU suite on tiny shapes in Triton's interpreter: rows that were checked, failures that do not stop it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_common
import gpu_suite
import gpu_suite_report as report
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[list[dict], str]:
    """One command from the repository's root."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("suite")
    command = [sys.executable, "benchmarks/gpu_suite.py", "--output", str(folder), "--dry-run", "--device", "cpu"]
    for group in (
        *("ops-2:4", "ops-unstructured", "gradients", "packed-2:4", "experts-checks"),
        *("decode", "training", "cost", "experts", "generate"),
    ):
        command += ["--group", group]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (folder / gpu_suite.ROWS).read_text().splitlines()]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((folder / "no_gpu.json").read_text())["measured"]["date"]
    return rows, (folder / gpu_suite.REPORT).read_text()


# Finders of an editable installation would hide whether the checkout is found.
UNINSTALLED = """
import importlib.util, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path.insert(0, "benchmarks")
import checkout
for name in ("kernels.triton.configs", "kernels.ops", "exporters.base", "nn"):
    print(importlib.util.find_spec(f"sparse_rt.{name}").origin)
"""


def test_the_package_is_found_in_the_checkout():
    done = subprocess.run([sys.executable, "-c", UNINSTALLED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [Path(line).exists() for line in done.stdout.split()] == [True] * 4


def test_every_part_writes_checked_rows(dry_run):
    rows, _ = dry_run
    kinds = {row["kind"] for row in rows}
    assert {"environment", "check", "decode", "training", "dx", "cost", "experts", "generate", "done"} <= kinds
    assert not [row for row in rows if row.get("error")]
    for row in rows:
        if row["kind"] in ("decode", "training"):
            dtype = torch.bfloat16
            gpu_common.check_error(row["rms"]["sparse"], row["rms"]["dense"], dtype)
            us, ratio = row["us"], row["ratio"]
            assert 0 < us["sparse"]["p10"] <= us["sparse"]["median"] <= us["sparse"]["p90"]
            assert ratio["of_medians"] == pytest.approx(us["dense"]["median"] / us["sparse"]["median"], rel=1e-2)
            # That of a d4 weight of a few rows of 2:4 is nearly all padding.
            assert row["sparse_bytes"] < row["dense_bytes"] or (row["pattern"] == "2:4" and "d4" in row["path"])


def test_every_kernel_is_timed_beside_the_way_without_it(dry_run):
    rows = [row for row in dry_run[0] if "us" in row]
    decode = {row["path"]: row for row in rows if row["kind"] == "decode"}
    assert set(decode) == {"scratch", "linear", "d4", "d4 scratch"}, "whatever the dispatch table says"
    assert "scratch_ratio" in decode["d4"] and "scratch_ratio" not in decode["scratch"]
    assert {row["path"] for row in rows if row["kind"] == "dx"} == {"scratch", "linear_t"}


def test_training_costs_are_compared_with_three_dense_baselines(dry_run):
    rows = [row for row in dry_run[0] if row["kind"] == "cost"]
    assert {row["path"] for row in rows} == {"spp", "masklora", "seft", "values", "dcft"}
    for row in rows:
        assert set(row["ratios"]) == set(row["baseline_us"]) == {"official_spp", "lora", "masked_dense"}
        assert row["scratch_ratio"]["median"] > 0, "beside the way of an unmeasured GPU"
        assert row["rms"]["sparse"] < 1e-2


def test_experts_are_compared_with_two_dense_ways(dry_run):
    rows = [row for row in dry_run[0] if row["kind"] == "experts"]
    assert {row["pattern"] for row in rows} == {"2:4", "unstructured"}
    for row in rows:
        gpu_common.check_error(row["rms"]["sparse"], row["rms"]["dense"], torch.bfloat16)
        assert set(row["ratios"]) == set(row["baseline_us"]) == {"loop", "grouped"}
        assert row["us"]["dense"] == row["baseline_us"][row["fastest"]], "beside the faster of them"
        assert row["sparse_bytes"] < row["dense_bytes"] and row["chosen_experts"] <= 4
    checks = {row["check"] for row in dry_run[0] if row["kind"] == "check"}
    assert {"experts", "experts, some of another rank", "experts, all on one"} <= checks
    assert "## Experts: dense products in a loop" in dry_run[1]


def test_the_kernels_of_the_interpreter_were_checked(dry_run):
    checks = {(row["check"], row["pattern"]) for row in dry_run[0] if row["kind"] == "check"}
    for name in (
        "linear",
        "linear kernel",
        "linear_t kernel",
        "values_grad",
        "values_grad kernel",
        "decompress",
        "gather",
        "pack and unpack",
        "packed_linear",
    ):
        assert (name, "2:4") in checks
    assert {("linear", "unstructured"), ("factors", "2:4"), ("growth", "2:4"), ("rank_products", "2:4")} <= checks


def test_the_tables_hold_the_figures(dry_run):
    rows, text = dry_run
    row = next(row for row in rows if row["kind"] == "decode" and row["path"] == "d4")
    assert f"## Decode, {row['tokens']} tokens, d4" in text
    assert f"{row['ratio']['median']:.2f}" in text and f"{row['m']}x{row['n']}" in text
    assert "## Cost of a training step, masklora" in text and "## Dispatch table" in text
    assert "## Training step, values" in text and "## Decode step of the whole model" in text


class Context(gpu_common.Context):
    def __init__(self):
        self.rows = []
        super().__init__(CPU, True, float("inf"), self.rows.append)


def test_a_wrong_result_becomes_an_error_row_and_is_not_timed(monkeypatch):
    import gpu_suite_speed as speed

    real = speed.ops.linear
    monkeypatch.setattr(speed.ops, "linear", lambda x, *rest: real(x, *rest) * (1.01 if x.shape[0] == 3 else 1.0))
    context = Context()
    (task, *_) = speed.tasks("decode", ("Llama-3-8B",))(context)
    task.run(context)
    wrong = [row for row in context.rows if row.get("error")]
    wrong = [row for row in wrong if "d4" not in row["path"]]  # which needs a GPU, or the interpreter
    assert {(row["tokens"], row["path"]) for row in wrong} == {(3, "linear"), (3, "scratch")}
    assert all("relative RMS error" in row["error"] and "us" not in row for row in wrong)
    timed = {(row["tokens"], row["path"]) for row in context.rows if "us" in row}
    assert timed == {(1, "linear"), (1, "scratch")}
    assert "## Errors" in report.report(context.rows)


def test_wrong_experts_become_an_error_row_and_are_not_timed(monkeypatch):
    import gpu_suite_experts as experts

    real = experts.moe.experts
    monkeypatch.setattr(experts.moe, "experts", lambda *arguments: real(*arguments) * 1.01)
    context = Context()
    for task in (experts.check_tasks(context)[0], experts.tasks(context)[0]):
        task.run(context)
    assert {row["kind"] for row in context.rows} == {"check", "experts"}
    assert all("relative RMS error" in row["error"] and "us" not in row for row in context.rows)


def test_without_a_grouped_product_experts_are_compared_with_the_loop(monkeypatch):
    import gpu_suite_experts as experts

    def missing(*_, **__):
        raise RuntimeError("grouped gemm is only supported on later GPUs")

    monkeypatch.setattr(torch, "_grouped_mm", missing)
    context = Context()
    experts.tasks(context)[0].run(context)
    (row,) = context.rows
    assert set(row["ratios"]) == {"loop"} and row["no_grouped"].startswith("grouped gemm is only supported")
    assert row["fastest"] == "loop" and "## Experts" in report.report(context.rows)


def test_results_that_are_not_numbers_are_wrong():
    nan = torch.full((2, 2), float("nan"))
    with pytest.raises(gpu_common.Wrong):
        gpu_common.check_error(gpu_common.rms(nan, torch.ones(2, 2)), 1e-3, torch.bfloat16)


def options(*more):
    return gpu_suite.parse(["--output", "unused", "--dry-run", "--device", "cpu", *more])


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A worker of a few lines in place of the real one."""

    def write(text: str):
        path = tmp_path / "worker.py"
        path.write_text("import json, sys\nstart = int(sys.argv[sys.argv.index('--start') + 1])\n" + text)
        monkeypatch.setattr(gpu_suite, "__file__", str(path))

    return write


def test_a_process_that_dies_costs_one_task(tmp_path, script):
    script("""
for number in range(start, 4):
    print(json.dumps({"kind": "started", "task": f"t{number}", "number": number}), flush=True)
    if number == 1:
        import os
        os.abort()
    print(json.dumps({"kind": "done", "task": f"t{number}", "seconds": 0}), flush=True)
""")
    import time

    rows = gpu_suite.Rows(tmp_path / "out", time.monotonic())
    gpu_suite.run_groups({"a": 1.0}, options(), rows, 1)
    assert [row["task"] for row in rows.all if row["kind"] == "done"] == ["t0", "t2", "t3"]
    (error,) = [row for row in rows.all if row["kind"] == "error"]
    assert error["task"] == "t1" and "ended with status" in error["error"]


def test_a_process_that_hangs_is_ended_in_time(tmp_path, script, monkeypatch):
    script("import time\nprint(json.dumps({'kind': 'started', 'task': 't', 'number': 0}), flush=True)\ntime.sleep(60)")
    import time

    monkeypatch.setattr(gpu_suite, "GRACE", 0.5)
    start = time.monotonic()
    rows = gpu_suite.Rows(tmp_path / "out", start)
    gpu_suite.run_groups({"a": 1.0}, options("--minutes", "0.01"), rows, 1)
    assert time.monotonic() - start < 10
    assert [(row["task"], row["error"]) for row in rows.all] == [("t", "ended because its time was over")]


def test_bars_are_compared_with_the_geometric_mean_of_the_faster_path():
    def row(layer, path, ratio, m):
        cell = {"pattern": "2:4", "sparsity": 0.5, "model": "Llama-3-8B", "layer": layer, "n": 1}
        return {"kind": "prefill", "tokens": 2048, "path": path, "ratio": {"median": ratio}, "m": m, **cell}

    rows = [row("q", "mma_sp scratch", 0.9, 1), row("q", "cslt", 1.6, 1), row("up", "cslt", 0.9, 2)]
    assert "| 2:4 prefill, 2048 tokens and more | 1.15 | 1.20 | 0.90 | 1.60 | yes |" in report.bars(rows)
    assert report.slower(rows).count("\n- ") == 1
