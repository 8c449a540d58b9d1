"""The kernel benchmark: complete rows, ratios that follow from the times, wrong results that are never timed."""

import json

import cpu_kernels
import cpu_kernels_report as report
import dense_baseline
import pytest
import timing
import torch
from click.testing import CliRunner

from sparse_rt.errors import UserError

OPTIONS = ["--shape", "48x64", "--seconds-per-cell", "0"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A few copies are enough where nobody looks at the times."""
    monkeypatch.setattr(cpu_kernels, "MAX_COPIES", 3)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*options):
    return CliRunner().invoke(cpu_kernels.main, [*OPTIONS, *options])


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_cell_becomes_a_complete_row(tmp_path):
    output = tmp_path / "rows.jsonl"
    cells = ["--sparsity", "0.5", "--sparsity", "0.9"]
    done = run(*cells, "--tokens", "1", "--tokens", "5", "--threads", "1", "--threads", "2", "--output", str(output))
    assert done.exit_code == 0, done.output
    rows = rows_of(output)
    assert (
        len(rows) == 3 * 2 * 2 and len({(r["pattern"], r["sparsity"], r["tokens"], r["threads"]) for r in rows}) == 12
    )
    has_own = dense_baseline.unavailable_reason() is None
    for row in rows:
        kinds = {"torch", "sparse"} | ({"dense"} if has_own else set())
        assert (row["m"], row["n"], row["dtype"], row["error"]) == (48, 64, "bfloat16", None)
        assert row["torch"] == torch.__version__ and row["isa"] and row["processor"] and row["date"] and row["layout"]
        assert set(row["ms"]) == set(row["rms"]) == kinds
        assert max(row["rms"].values()) < cpu_kernels.MAX_RMS
        assert all(0 < ms["p10"] <= ms["median"] <= ms["p90"] for ms in row["ms"].values())
        assert (row["cpu_ms"] is None) == (row["threads"] == 2)
        assert (row["ratio_dense"] is not None) == has_own
        assert row["bytes"]["dense"] == 48 * 64 * 2
        assert row["limit"]["packed"] == pytest.approx(row["bytes"]["dense"] / row["bytes"]["packed"], abs=1e-3)
        assert row["turns"] == cpu_kernels.MIN_TURNS
    assert "## 5 tokens, 2 threads, bfloat16" in done.output and "| 48x64 |" in done.output


def test_rows_are_appended(tmp_path):
    output = tmp_path / "rows.jsonl"
    for _ in range(2):
        assert run("--pattern", "2:4", "--tokens", "1", "--threads", "1", "--output", str(output)).exit_code == 0
    assert len(rows_of(output)) == 2 and len(report.latest(rows_of(output))) == 1


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_dtypes_have_torch_as_their_only_baseline(dtype, tmp_path):
    output = tmp_path / "rows.jsonl"
    done = run("--dtype", dtype, "--pattern", "2:4", "--tokens", "2", "--threads", "1", "--output", str(output))
    assert done.exit_code == 0, done.output
    (row,) = rows_of(output)
    assert row["ratio_dense"] is None and row["ratio_torch"]["median"] > 0 and row["rms"]["sparse"] < 1e-3


def test_a_wrong_result_is_reported_and_not_timed(tmp_path, monkeypatch):
    right = cpu_kernels.packed.packed_linear
    monkeypatch.setattr(cpu_kernels.packed, "packed_linear", lambda *arguments: right(*arguments) * 1.01)
    output = tmp_path / "rows.jsonl"
    done = run("--pattern", "2:4", "--tokens", "1", "--threads", "1", "--output", str(output))
    assert done.exit_code == 1 and "1 cells are wrong" in done.output
    (row,) = rows_of(output)
    assert "relative RMS error of 2:4 0.5" in row["error"] and "ms" not in row


def test_shapes_groups_and_patterns_are_chosen_by_name():
    everything = cpu_kernels.shapes_of(["all"], [])
    assert len(everything) == len(set(everything)) == 14 and (11008, 4096) in everything
    assert cpu_kernels.shapes_of(["bars"], []) == [(11008, 4096), (4096, 14336)]
    assert cpu_kernels.shapes_of(["all"], ["16x8", "16x8"]) == [(16, 8)]
    assert cpu_kernels.used_by(4096, 14336) == ["Llama-3-8B down", "llama-8b down"]
    cells = cpu_kernels.cells_of(["unstructured", "2:4", "1:4"], [0.5, 0.9])
    assert [str(cell) for cell in cells] == ["unstructured 0.5", "unstructured 0.9", "2:4 0.5", "1:4 0.75"]
    with pytest.raises(UserError, match="11008x4096"):
        cpu_kernels.shapes_of(["all"], ["16*8"])


def test_copies_outgrow_the_cache_and_memory_has_a_limit(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "MAX_COPIES", 512)
    assert cpu_kernels.copies_for(512 * 2048 * 2) * 512 * 2048 * 2 >= cpu_kernels.ROTATED_BYTES
    assert cpu_kernels.copies_for(1 << 30) == 2
    monkeypatch.setattr(cpu_kernels, "MEMORY_BYTES", 1 << 20)
    with pytest.raises(UserError, match=r"GiB, the limit .* fewer --sparsity"):
        cpu_kernels.columns(512, 512, torch.zeros(1, 512), cpu_kernels.cells_of(["2:4"], []))


def test_ratios_are_taken_within_a_turn():
    # The machine becomes ten times slower half-way: the ratio within a turn does not notice.
    dense, sparse = [2.0, 2.0, 20.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0, 5.0]
    found = timing.ratio(dense, sparse)
    assert found["median"] == 2.0 and found["p90"] > 2.0 and found["of_medians"] == pytest.approx(20 / 5)
    assert timing.spread([0.001, 0.002, 0.003], 1e3) == {"p10": 1.2, "median": 2.0, "p90": 2.8}


def test_processor_time_is_used_where_the_core_was_taken_away():
    quiet = timing.Samples({"a": [1.0] * 10, "b": [2.0] * 10}, {"a": [1.0] * 10, "b": [2.0] * 10})
    assert quiet.clock("a", "b") == "wall" and quiet.preempted("a", "b") == 0.0
    taken = timing.Samples({"a": [1.0] * 7 + [9.0] * 3, "b": [2.0] * 10}, quiet.cpu)
    assert taken.preempted("a", "b") == pytest.approx(0.3) and taken.clock("a", "b") == "cpu"
    assert taken.clock("b") == "wall"
    facts = cpu_kernels.times(taken, [("torch", "b"), ("sparse", "a")])
    assert facts["clock"] == "cpu" and facts["ratio_torch"]["p10"] == facts["ratio_torch"]["p90"] == 2.0
    assert facts["ms"]["sparse"]["p90"] > facts["cpu_ms"]["sparse"]["p90"] and facts["ratio_dense"] is None
    threads = timing.Samples({"a": [1.0], "b": [2.0]})
    assert threads.preempted("a") is None and threads.clock("a") == "wall"


def test_columns_take_turns():
    calls = []
    columns = {name: lambda turn, name=name: calls.append((turn, name)) for name in "abc"}
    samples = timing.take_turns(columns, seconds=0, min_turns=5, max_turns=9, one_thread=True)
    assert samples.turns == 5 and len(samples.cpu["a"]) == 5
    assert [sorted(calls[at : at + 3]) for at in range(0, 18, 3)] == [[(t, n) for n in "abc"] for t in range(6)]
    assert len({tuple(name for _, name in calls[at : at + 3]) for at in range(3, 18, 3)}) > 1, "always the same order"
    assert timing.take_turns(columns, seconds=60, min_turns=1, max_turns=4, one_thread=False).turns == 4


def row(shape=(11008, 4096), tokens=1, pattern="unstructured", sparsity=0.5, torch_ratio=4.4, dense_ratio=1.7, **other):
    def spread(value):
        return {"p10": value * 0.9, "median": value, "p90": value * 1.1, "of_medians": value}

    return {
        **dict(m=shape[0], n=shape[1], tokens=tokens, threads=1, dtype="bfloat16", isa="avx512", processor="x (y)"),
        **dict(pattern=pattern, sparsity=sparsity, error=None, busy_cores=0.0, clock="wall", turns=9),
        **dict(rms={"sparse": 1e-3}, limit={"packed": 1.77, "canonical": 1.77}),
        **dict(ratio_torch=spread(torch_ratio), ratio_dense=spread(dense_ratio)),
    } | other


def test_bars_are_met_or_missed():
    text = report.bars_table([row(), row(sparsity=0.75, torch_ratio=4.0), row((4096, 14336), torch_ratio=3.65)])
    first, second = [line for line in text.splitlines() if line.startswith(("| 11008", "| 4096"))]
    assert "4.40 (4.00) met / 1.70 (1.55) met" in first
    assert "4.00 (5.00) **missed by 20%** / 1.70 (1.95) **missed by 13%**" in first and "not measured" in first
    assert "3.65 (3.60) met" in second, "nine tenths of the bar on the second shape"
    assert report.bars_table([row(threads=2)]) == "" == report.bars_table([row(dtype="float16")])


def test_cells_slower_than_dense_are_listed_with_their_spread():
    rows = [row(torch_ratio=0.96), row(tokens=64, torch_ratio=0.94)]
    text = report.tables(rows)
    assert "More than 5 % slower than torch dense: 1 of 2 cells" in text
    assert "11008x4096 50%, 64 tokens, 1 thread, bfloat16, avx512: 0.94 (p10 0.85, p90 1.03)" in text
    assert "No cell of 1 takes more than 5 % longer" in report.tables(rows[:1])


def test_the_last_row_of_a_cell_counts_and_errors_are_shown():
    text = report.tables([row(torch_ratio=0.5), row(torch_ratio=4.0), row(tokens=4, error="is wrong")])
    assert "| 11008x4096 | 4.00 / 1.70 |" in text and "0.50" not in text
    assert "11008x4096 50%, 4 tokens, 1 thread, bfloat16, avx512: is wrong" in text


def test_chart_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(sparsity=sparsity, tokens=tokens) for sparsity in (0.5, 0.75) for tokens in (1, 4)]
    report.plot([*rows, row(pattern="2:4", ratio_dense=None)], tmp_path / "chart.png", threads=1)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
