"""The pruning benchmark covers what is registered, measures what convert writes, and says where the order fails."""

import json

import pruning_quality as quality
import pruning_quality_report as report
import pytest
import torch
from click.testing import CliRunner

import helpers
from sparse_rt import assets
from sparse_rt.pruning import known_pruners, known_repairs


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row(method, target, perplexity, variant="uniform", **more):
    fields = dict(zip(quality.Cell._fields, (method, *target, variant), strict=True))
    return {**fields, "perplexity": perplexity, "seconds": 2.0, "peak_bytes": 30_000_000, **more}


def whole(**changed):
    figures = {"alps": 15, "sparsegpt": 16, "wanda": 18, "magnitude": 30, "wanda+admm": 17, **changed}
    rows = [row(name, target, value) for target in report.BARS for name, value in figures.items()]
    return [row("dense", ("dense", 0.0), 14.5), *rows]


def test_every_registered_method_has_a_cell_at_every_target():
    cells = quality.cells()
    assert len(cells) == len(set(cells))
    uniform = {cell[:3] for cell in cells if cell.variant == "uniform"}
    for pattern, sparsity in quality.TARGETS:
        for name in set(known_pruners()) - {"none"}:
            assert (name, pattern, sparsity) in uniform
        assert all((f"wanda+{repair}", pattern, sparsity) in uniform for repair in known_repairs())
    assert {cell.pattern for cell in cells if cell.variant == "owl"} == {"unstructured"}
    assert {cell.pattern for cell in cells if cell.variant == "transposable"} == {"2:4", "4:8"}


def test_a_cell_is_what_convert_and_eval_give(tmp_path, monkeypatch):
    model = helpers.tiny_llama(tmp_path / "model")
    (tmp_path / "held.txt").write_text(assets.heldout_text().read_text()[:60_000])
    monkeypatch.setattr(assets, "model_dir", lambda: model)
    monkeypatch.setattr(assets, "heldout_text", lambda: tmp_path / "held.txt")
    monkeypatch.setattr(quality, "CALIBRATION", {"num_samples": 3, "max_seq_len": 24})
    monkeypatch.setattr(quality.quality_methods, "CONTEXT", 128)
    found = quality.measure(quality.Cell("wanda", "unstructured", 0.75, "owl"))
    assert found["mean_sparsity"] == pytest.approx(0.75, abs=0.01) and found["peak_bytes"] > 0
    dense = quality.measure(quality.cells()[0])
    assert 1000 < dense["perplexity"] != found["perplexity"] > 1000  # an untrained model of 4096 tokens
    assert quality.cell_of(json.loads(json.dumps(found))) == ("wanda", "unstructured", 0.75, "owl")


def test_finished_cells_are_skipped_and_unknown_methods_refused(tmp_path):
    output = tmp_path / "rows.jsonl"
    wanted = [cell for cell in quality.cells() if cell.method == "wanda"]
    output.write_text("".join(json.dumps(row(c.method, c[1:3], 9.0, c.variant)) + "\n" for c in wanted))
    done = CliRunner().invoke(quality.main, ["--output", str(output), "--method", "wanda"], catch_exceptions=False)
    assert done.exit_code == 0 and not done.output
    assert len(output.read_text().splitlines()) == len(wanted)
    refused = CliRunner().invoke(quality.main, ["--output", str(output), "--method", "wandb"])
    assert refused.exit_code == 2 and "unknown method wandb; known are dense, " in refused.output


def invoke(tmp_path, rows, *more):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return CliRunner().invoke(report.main, [str(tmp_path / "rows.jsonl"), *more], catch_exceptions=False)


def test_the_report_shows_the_last_row_of_a_cell_and_every_variant(tmp_path):
    rows = [row("wanda", ("2:4", 0.5), 99.0), *whole()]
    rows += [row("wanda", ("unstructured", 0.6), 17.5, "owl"), row("alps", ("2:4", 0.5), 19.0, "transposable")]
    done = invoke(tmp_path, rows, "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 0 and "Dense: 14.50." in done.output and "99" not in done.output
    assert "| wanda | 18.00 | 18.00 | 2.0 | 30 |" in done.output
    assert "OWL:" in done.output and "| wanda | 17.50 | 2.0 | 30 |" in done.output
    assert "Transposable:" in done.output and "| alps | 19.00 | 2.0 | 30 |" in done.output
    assert "kept: 2:4: alps <= sparsegpt: 15.00 and 16.00" in done.output and "missed" not in done.output
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_refusal_is_a_row_that_shows_as_a_dash(tmp_path):
    cell, found, problem = quality._measured(quality.Cell("none", "2:4", 0.5, "owl"))
    assert not problem and "--method none prunes nothing" in found["refused"] and quality.cell_of(found) == cell
    done = invoke(tmp_path, [*whole(), {**found, "variant": "uniform", "method": "wanda", "pattern": "4:8"}])
    assert done.exit_code == 0 and "| wanda | 18.00 | - | 18.00 | 2.0 | 30 |" in done.output


@pytest.mark.parametrize(
    "rows, words",
    [
        (whole(sparsegpt=18.5), "missed: 60 %: sparsegpt <= wanda: 18.50 and 18.00"),
        (whole(**{"wanda+admm": 18}), "missed: 2:4: wanda+admm < wanda: 18.00 and 18.00"),
        (whole()[:-1], "missed: 60 %: wanda+admm < wanda: not measured"),
    ],
)
def test_a_missed_bar_is_named_and_ends_with_1(tmp_path, rows, words):
    done = invoke(tmp_path, rows)
    assert done.exit_code == 1 and words in done.output
