"""The quality benchmark chooses learning rates by the right figure, skips what is done, and its LoRA keeps the mask."""

import json

import pytest
import quality
import quality_methods
import quality_report
import torch
from click.testing import CliRunner

import helpers
from sparse_rt.hf.load import load
from sparse_rt.nn import sparse_linears


def row(method, seed=0, perplexity=16.0, kind="run", rate=None, **more):
    pruner, pattern, sparsity = quality.TUNING_BASE if kind == "tune" else quality.BASES[0]
    fields = dict(kind=kind, pruner=pruner, pattern=pattern, sparsity=sparsity, method=method, seed=seed)
    name = "validation_perplexity" if kind == "tune" else "perplexity"
    return {**fields, "learning_rate": rate, name: perplexity, **more}


def test_the_rate_with_the_lowest_validation_perplexity_is_used():
    rows = [row("spp", kind="tune", rate=rate, perplexity=p) for rate, p in ((1e-3, 17.0), (1e-2, 15.5), (1e-1, 19.0))]
    assert quality.tuned_rate([*rows, row("spp", perplexity=1.0, rate=1e-1)], "spp") == 1e-2
    with pytest.raises(Exception, match="--tune"):
        quality.tuned_rate(rows, "masklora")


def test_every_method_gets_the_same_trials_and_every_base_every_seed():
    tuned = quality.cells("tune", ["spp", "masklora", "lora-remask", "reconstruct"], [0, 1])
    assert len(tuned) == 3 * len(quality.MULTIPLES) == len({c.key for c in tuned}), "reconstruct trains no adapter"
    assert not {c.seed for c in tuned} & set(quality.SEEDS)
    run = quality.cells("run", ["spp", "reconstruct"], [0, 1])
    assert len(run) == 1 + len(quality.BASES) * (1 + 2 * 2) == len({c.key for c in run})


def test_finished_cells_are_skipped(tmp_path):
    output = tmp_path / "rows.jsonl"
    cells = quality.cells("tune", ["spp"], [0])
    output.write_text("".join(json.dumps(row("spp", c.seed, kind="tune", rate=c.rate)) + "\n" for c in cells))
    arguments = ["--output", str(output), "--workdir", str(tmp_path / "work"), "--tune", "--method", "spp"]
    done = CliRunner().invoke(quality.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and not done.output
    assert len(output.read_text().splitlines()) == len(cells)


def test_the_table_shows_mean_and_spread_and_the_last_row_of_a_cell(tmp_path):
    rows = [row("dense", perplexity=14.5), row("pruned", perplexity=17.0), row("spp", 0, 99.0)]
    rows += [row("spp", seed, p, trainable_parameters=1234) for seed, p in ((0, 16.0), (1, 16.5), (2, 16.1))]
    text = quality_report.table(rows)
    assert "Dense: 14.50" in text and "| SPP | 1,234 | 16.20 ±0.25 |" in text and "| pruned |  | 17.00 |" in text
    quality_report.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_report_compares_spp_with_its_equations_seed_by_seed():
    rows = [row("spp", 0, 16.08), row("spp", 1, 15.0), row("spp-float64", 0, 16.0)]
    assert "| 2:4 wanda | 0 | 16.080 | 16.000 | +0.50% |" in quality_report.parity(rows)
    assert not quality_report.parity(rows[:2])


def test_lora_then_remask_leaves_the_zeros_zero(tmp_path):
    folder = helpers.compress_folder(helpers.tiny_llama(tmp_path / "dense"), tmp_path / "base", "2:4")
    base = load(folder, dequantize=True)
    model, facts = quality_methods.lora_then_remask(folder, tmp_path, seed=0, rate=0.01, steps=2)
    assert facts["trainable_parameters"] > 0 and facts["tokens"] > 0
    for name, layer in sparse_linears(load(folder)):
        weight = model.get_submodule(name).weight
        assert not weight[~layer.mask()].any() and not torch.equal(weight, base.get_submodule(name).weight)


def test_spp_in_float64_starts_and_ends_where_the_product_does(tmp_path):
    folder = helpers.compress_folder(helpers.tiny_llama(tmp_path / "dense", dtype=torch.float32), tmp_path / "b", "2:4")
    training = dict(seed=3, rate=0.02, steps=3)
    model, facts = quality_methods.spp_in_float64(folder, tmp_path, **training)
    ours, told = quality_methods.adapted("spp", folder, tmp_path, **training)
    assert facts["trainable_parameters"] == told["trainable_parameters"] and facts["tokens"] == told["tokens"]
    base = dict(sparse_linears(load(folder)))
    for name, layer in sparse_linears(ours):
        moved = model.get_submodule(name).weight - base[name].decompress()
        found = layer.decompress() - base[name].decompress()
        assert moved.any() and (found - moved).norm() < 1e-3 * moved.norm(), name
