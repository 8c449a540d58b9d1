"""The benchmarks of conversions: complete rows, and a plot of them."""

import json

import conversion_memory
import conversion_speed
import pytest
import torch
from click.testing import CliRunner

import helpers
from sparse_rt.formats import get_format


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(command, *arguments):
    done = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion_memory, "shape_of", lambda layers: conversion_memory.TINY)
    monkeypatch.setattr(conversion_memory, "run_fresh", conversion_memory.measure)
    usual = ("--workdir", tmp_path, "--layers", 2, "--num-samples", 2, "--max-seq-len", 16)
    files = ("--output", tmp_path / "rows.jsonl", "--plot", tmp_path / "plot.png")
    rows = rows_of(conversion_memory.main, *usual, *files, "--method", "wanda", "--method", "magnitude")
    assert [row["method"] for row in rows] == ["wanda", "magnitude"] and (tmp_path / "plot.png").stat().st_size > 1000
    for row in rows:
        assert row["peak"] > 0 and row["estimate"] == sum(row["parts"].values())
        assert row["estimated_seconds"]["total"] > 0 and row["seconds"] > 0
    block, activations = (rows[0]["parts"][name] for name in ("block", "activations"))
    assert rows[0]["bar"] == round(1.15 * (rows[0]["shard"] + block + activations)) and activations == 2 * 16 * 64 * 2
    assert rows[1]["bar"] == round(1.15 * rows[1]["shard"]) and 0 < rows[1]["shard"] < rows[1]["dense_bytes"]


def test_speed(tmp_path):
    rows = rows_of(conversion_speed.main, "--workdir", tmp_path, "--repeats", 1, "--small")
    assert [(row["pattern"], row["sparsity"]) for row in rows] == list(conversion_speed.CELLS)
    assert all(row["mb_per_core_second"] > 0 and row["wall_seconds"] > 0 for row in rows)


def test_a_result_that_differs_is_not_timed(tmp_path):
    source = helpers.tiny_llama(tmp_path / "dense")
    sparse = helpers.compress_folder(source, tmp_path / "sparse", "2:4")
    assert get_format("2:4").default_sparsity == 0.5
    with pytest.raises(conversion_speed.click.ClickException, match="does not come back"):
        conversion_speed.check(source, sparse)
