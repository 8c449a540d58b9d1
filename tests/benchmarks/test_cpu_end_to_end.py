"""The end-to-end benchmark on a tiny model: rows that hold together, models that are kept, bars that are judged."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cpu_end_to_end
import cpu_end_to_end_report as report
import pytest
from random_llama import Shape, dense_folder, sparse_folder

from sparse_rt.benchmarking.rows import Row
from sparse_rt.checkpoint import Checkpoint, SourceCheckpoint
from sparse_rt.child import in_fresh_process
from sparse_rt.config import BenchOptions
from sparse_rt.progress import Progress

FOLDER = Path(__file__).parents[2] / "benchmarks"
# Heads of 32: vLLM's attention on a CPU takes no smaller ones.
SIZES = dict(layers=1, hidden=64, intermediate=128, heads=2, kv_heads=1, vocabulary=4096)
LENGTHS = dict(prompt_tokens=8, new_tokens=3, prefill_tokens=16, train_tokens=8)


def run(workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    options = [
        word for name, value in (SIZES | LENGTHS).items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, str(FOLDER / "cpu_end_to_end.py"), "--workdir", str(workdir), "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options, *arguments], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("end_to_end")


@pytest.mark.parametrize("experts", [0, 4])
def test_the_models_are_what_their_shape_says_and_are_made_once(workdir, experts):
    shape = Shape(**SIZES, experts=experts)
    dense = dense_folder(workdir, shape, Progress())
    sparse = sparse_folder(workdir, shape, "unstructured", 0.75, Progress())
    count = {name: math.prod(entry.shape) for name, entry in SourceCheckpoint.open(dense).tensors.items()}
    assert sum(count.values()) == shape.parameters
    linear = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    assert sum(n for name, n in count.items() if name.endswith(linear)) == shape.linear_parameters
    weights = Checkpoint.open(sparse).weights.values()
    assert sum(weight.m * weight.n for weight in weights) == shape.linear_parameters
    assert sum(weight.nnz for weight in weights) == shape.linear_parameters // 4
    before = (sparse / "config.json").stat().st_mtime_ns
    sparse_folder(workdir, shape, "unstructured", 0.75, Progress())
    assert (sparse / "config.json").stat().st_mtime_ns == before


def test_the_byte_limit_is_that_of_the_files():
    assert Shape(vocabulary=0).byte_limit("unstructured", 0.75) == pytest.approx(1 / (0.25 + 1 / 16))
    assert Shape().byte_limit("2:4", 0.5) == Shape().byte_limit("unstructured", 0.5) < 1 / (0.5 + 1 / 16)
    assert Shape().parameters == pytest.approx(1.04e9, rel=0.01)


@pytest.mark.slow
def test_parts_write_rows_of_both_sides(workdir):
    pytest.importorskip("vllm")
    output = workdir / "rows.jsonl"
    parts = ("vllm-decode", "canonical")
    chosen = [word for part in parts for word in ("--part", part)]
    done = run(
        workdir,
        *("--model", "2:4", "--repeats", "1", "--batch", "1", "--batch", "2"),
        *("--output", str(output), *chosen),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["part"] for row in rows} == set(parts)
    decode = [row for row in rows if row["part"] == "vllm-decode" and row["phase"] == "decode"]
    assert [row["batch"] for row in decode] == [1, 2]
    for row in rows:
        pairs = zip(row["dense"]["samples"], row["sparse"]["samples"], strict=True)
        assert row["ratio"]["samples"] == [dense / sparse for dense, sparse in pairs]
        assert row["error"] is None and row["bench"]["commit"] and row["bench"]["threads"] == 1
    assert decode[0]["bench"]["engine_settings"]["dense_linear"] in ("oneDNN", "zentorch")
    (canonical,) = [row for row in rows if row["part"] == "canonical" and row["what"] == "tensors of the model"]
    stored = Checkpoint.open(next(workdir.glob("*-2of4"))).total_bytes
    assert canonical["sparse"]["median"] == pytest.approx(stored, rel=0.05)
    assert "SPARSE_RT_PACK=0" in canonical["bench"]["command"]
    judged = done.stdout.partition("## Serving in vLLM against its bars")[2].partition("## ")[0]
    for figure in (
        "load, engine start |  | 1 |",
        "memory, weights in the worker |  | 1 |",
        "decode, one step after 8 tokens | 1 | 1 |",
    ):
        assert f"| 2:4 | {figure}" in judged
    assert decode[0]["bench"]["command"] in done.stdout


def test_a_failed_part_is_a_row_and_an_exit_status(workdir):
    output = workdir / "failed.jsonl"
    done = run(workdir, "--model", "2:4", "--part", "hf-prefill", "--prefill-tokens", "5000", "--output", str(output))
    assert done.returncode == 1
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert "2048 positions" in row["error"] and row["part"] == "hf-prefill"
    assert "## Failed" in done.stdout


def test_derived_layouts_are_off_in_one_part_alone():
    with cpu_end_to_end.unpacked(True):
        assert in_fresh_process("os:getenv", "SPARSE_RT_PACK") == "0"
    with cpu_end_to_end.unpacked(False):
        assert in_fresh_process("os:getenv", "SPARSE_RT_PACK") == os.environ.get("SPARSE_RT_PACK")


def figure(model="0.5", batch=1, ratios=(2.0, 2.0), phase="decode", what="one step", dense="oneDNN", **changes):
    """A row as the benchmark writes it, with made-up figures."""
    row = Row("vllm", phase, what, "s", list(ratios), [1.0] * len(ratios), batch=batch, tokens=batch)
    bench = {"threads": 2, "cores": 2, "processor": "a processor", "packages": {"torch": "2"}, "commit": "abc"}
    bench |= {"date": "2026-01-01T00:00", "busy": [0.0, 0.0], "command": "sparse-rt bench"}
    bench |= {"engine_settings": {"dense_linear": dense}}
    about = {"part": "vllm-decode", "model": model, "parameters": 100, "linear_parameters": 90, "byte_limit": 1.7}
    return {**row.to_dict(), **about, "bench": bench, "error": None, **changes}


WEIGHTS = dict(phase="memory", what="weights in the worker", batch=None)
START = dict(phase="load", what="engine start", batch=None)


@pytest.mark.parametrize(
    "row, verdict",
    [
        (dict(ratios=(1.7, 1.8, 1.9)), "reached, not in every pair"),
        (dict(ratios=(1.2, 1.2)), "missed by 33%"),
        (dict(ratios=(1.7, 1.7), dense="zentorch"), "reached"),
        (dict(model="2:4", batch=4, ratios=(1.3, 1.3)), "reached"),
        (dict(model="0.7", ratios=(2.0, 2.0)), "missed by 20%"),
        (dict(model="0.75", batch=4, ratios=(1.55, 1.55), dense="zentorch"), "reached"),
        (dict(batch=16, ratios=(0.96, 0.97)), "reached"),
        (dict(phase="prefill", ratios=(0.91, 0.91), dense="zentorch"), "reached"),
        (dict(phase="prefill", ratios=(0.76, 0.76)), "missed by 20%"),
        (dict(WEIGHTS, ratios=(1.7,)), "reached"),  # 0.588 of dense
        (dict(WEIGHTS, model="0.75", ratios=(2.5,)), "missed by 10%"),  # 0.4 of dense
        (dict(START, ratios=(0.8,)), "reached"),
        (dict(START, ratios=(0.5,)), "missed by 35%"),
    ],
)
def test_the_bars_are_those_of_serving(row, verdict):
    (line,) = [line for line in report.bars([figure(**row)]).splitlines() if line.startswith(("| 0", "| 2"))]
    assert line.split("|")[-2].strip() == verdict


def test_figures_without_a_bar_are_not_judged():
    rows = [figure(batch=8), figure(phase="serve"), figure(dense="as vLLM chooses"), figure(engine="hf")]
    rows += [figure(**WEIGHTS, model="0.7"), figure(**{**WEIGHTS, "what": "engine after one token"})]
    assert report.bars(rows) == ""


def test_each_dense_product_keeps_its_own_figures():
    text = report.tables([figure(ratios=(3.0,)), figure(ratios=(2.5,), dense="zentorch")])
    assert "## vllm-decode (dense: oneDNN)" in text and "## vllm-decode (dense: zentorch)" in text
    assert "3.00x" in text and "2.50x" in text


def test_the_sweep_is_a_part_of_its_own():
    lengths = dict(prompt=8, new=4, prefill=16, train=8)
    load = dict(request_rate=[4.0, math.inf], num_prompts=5)
    fields = cpu_end_to_end.part_options("vllm-serve", lengths, [1], 2, load, compile=True)
    options = BenchOptions.build(model="model", **fields)
    assert options.phase == ["serve"] and options.engine == ["vllm"] and options.num_prompts == 5
    command = cpu_end_to_end.command(options)
    assert "--request-rate 4.0 --request-rate inf" in command and "--phase serve" in command
    assert "--compile" in command.split() and "True" not in command


def test_the_last_figure_counts_and_noise_is_said():
    old, new = figure(ratios=(3.0,)), figure(ratios=(2.5,))
    failed = {key: new[key] for key in ("part", "model", "parameters", "linear_parameters", "byte_limit", "bench")}
    text = report.tables([old, failed | {"error": "too busy"}, new])
    assert "2.50x" in text and "3.00x" not in text and "too busy" not in text and "idle" not in text
    assert "too busy" in report.tables([failed | {"error": "too busy"}])
    busy = figure(bench=new["bench"] | {"busy": [0.0, 1.2]})
    assert "up to 1.2 cores busy" in report.tables([busy])
