"""``bench --phase serve``: real servers at several request rates, figures that follow from the samples, the report.

The run weighs the workers of the offline engines, too: its model is large enough that weights stand out from what else
a process allocates.
"""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch

import helpers
from sparse_rt.benchmarking import vllm_serving
from sparse_rt.benchmarking.rendering import SWEEP_PANELS, sweep_panels
from sparse_rt.benchmarking.rows import Row
from sparse_rt.benchmarking.vllm_serving import METRICS, Drives
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import BenchOptions
from sparse_rt.errors import SparseRTError
from sparse_rt.report import bar_chart
from sparse_rt.workflows.bench import bench, table_rows

SIZES = dict(hidden_size=512, intermediate_size=4096, num_hidden_layers=12)
# Steps of 12 layers take 12 to 20 ms. With 3 layers (3 to 8 ms) the front process of a busy machine is always a step
# behind, and sends answers in one piece however long they are.
RATES, REQUESTS, NEW_TOKENS = [8.0, float("inf")], 4, 32


@pytest.fixture
def one_thread():
    """Bound threads would share their cores with the tests that run beside these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def commands_naming(folder: Path) -> list[str]:
    """Command lines of running processes that name a path in ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        found += [command] if str(folder) in command else []
    return found


@pytest.mark.slow
def test_both_servers_answer_everything_at_every_rate(one_thread, tmp_path):
    pytest.importorskip("vllm")
    dense = helpers.tiny_llama(tmp_path / "dense", **SIZES)
    sparse = helpers.compress_folder(dense, tmp_path / "sparse", "unstructured", 0.75)
    options = BenchOptions(
        model=str(sparse),
        baseline=str(dense),
        engine=["vllm"],
        phase=["memory", "serve"],
        request_rate=RATES,
        num_prompts=REQUESTS,
        prompt_tokens=8,
        new_tokens=NEW_TOKENS,
        repeats=2,
        report=tmp_path / "report",
    )
    result = bench(options)
    assert commands_naming(tmp_path) == []

    start, *sweep = [row for row in result["rows"] if row["phase"] == "serve"]
    assert start["what"] == "server start" and len(start["dense"]["samples"]) == 1
    assert [(row["request_rate"], row["metric"]) for row in sweep] == [
        (rate, metric) for rate in (8.0, "inf") for metric in METRICS
    ]
    for row in sweep:
        pairs = list(zip(row["dense"]["samples"], row["sparse"]["samples"], strict=True))
        ratios = [dense / sparse for dense, sparse in pairs]
        assert len(ratios) == 2 and row["ratio"]["samples"] == ratios
        assert row["ratio"]["median"] == statistics.median(ratios) and min(pairs[0]) > 0
    by_key = {(row["metric"], row["request_rate"]): row for row in sweep}
    for side in ("dense", "sparse"):
        # Tokens do not come faster than requests arrive: the last of 4 at 8 a second starts after half a second.
        slow = by_key["output_throughput", 8.0]["tokens_per_second"][side]
        assert 0 < slow <= REQUESTS * NEW_TOKENS / (REQUESTS / 8.0) * 1.01
        for rate in (8.0, "inf"):
            for name in ("ttft", "tpot"):
                worst, middle = by_key[f"p99_{name}", rate], by_key[f"median_{name}", rate]
                for pair in range(2):
                    assert worst[side]["samples"][pair] >= middle[side]["samples"][pair]
    check_report(result, tmp_path / "report")
    check_weights(result, sparse)
    served_by = result["engines"]["vllm"]
    assert served_by["dense_linear"] in ("oneDNN", "zentorch") and "--dtype bfloat16" in served_by["server"]


def check_report(result, report):
    written = (report / "report.json").read_text()
    assert json.loads(written, parse_constant=pytest.fail)["settings"]["request_rate"] == [8.0, "inf"]
    markdown = (report / "report.md").read_text()
    cells = [row for row in table_rows(result) if "rate inf: output tokens a second" in row]
    assert len(cells) == 1 and " | ".join(map(str, cells[0])) in markdown and "tok/s" in cells[0][4]
    assert (report / "report.png").read_bytes().startswith(b"\x89PNG")


def check_weights(result, sparse):
    (row,) = [row for row in result["rows"] if row["what"] == "weights in the worker"]
    weights = Checkpoint.open(sparse).weights.values()
    elements, kept = sum(weight.m * weight.n for weight in weights), sum(weight.nnz for weight in weights)
    saved = 2 * elements - (2 * kept + elements / 8)  # bfloat16 values, a bit a position
    # What both workers allocate besides cancels out, up to a few megabytes of it.
    assert row["dense"]["median"] > 2 * elements
    assert row["dense"]["median"] - row["sparse"]["median"] == pytest.approx(saved, rel=0.25)


@pytest.mark.slow
def test_a_model_that_cannot_be_served_is_named_with_the_cause(one_thread, tmp_path):
    pytest.importorskip("vllm")
    dense = helpers.tiny_llama(tmp_path / "dense", num_attention_heads=2, num_key_value_heads=1)
    sparse = helpers.compress_folder(dense, tmp_path / "sparse", "unstructured")
    unknown = shutil.copytree(dense, tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    options = BenchOptions(
        model=str(sparse), baseline=str(unknown), engine=["vllm"], phase=["serve"], prompt_tokens=8, new_tokens=4
    )
    with pytest.raises(SparseRTError, match=r"server for .*unknown ended \(exit code 1\).*NoSuchModel"):
        bench(options)
    assert commands_naming(tmp_path) == []


class Stub:
    """A server and a load generator whose drives end as the test says."""

    folder, port, session = Path("folder"), 1, 0

    def __init__(self, **found):
        self.found = {"completed": 2, "output_tokens": [4, 4], "duration": 2.0, "errors": [], "median_tpot": 0.1}
        self.found |= found
        self.seeds = []

    def check(self):
        pass

    def ask(self, method, job, timeout):
        self.seeds.append(job["seed"])
        return self.found


@pytest.fixture
def drives(monkeypatch):
    monkeypatch.setattr(vllm_serving, "wait_until_idle", lambda session: True)
    options = BenchOptions(model="model", num_prompts=2, prompt_tokens=3, new_tokens=4)
    return lambda stub: Drives(stub, {"dense": stub, "sparse": stub}, "dense", 100, options)


def test_requests_that_fail_or_stop_early_end_the_run(drives):
    lost = Stub(completed=1, output_tokens=[4, 0], errors=["ConnectionResetError: gone"])
    with pytest.raises(SparseRTError, match="1 of 2 requests to the OpenAI server for folder failed: Connection"):
        drives(lost).drive(1.0, seed=0)
    with pytest.raises(SparseRTError, match="answered with 3 to 4 tokens where 4 were asked for"):
        drives(Stub(output_tokens=[4, 3])).drive(1.0, seed=0)


def test_a_drive_whose_answers_came_in_one_piece_is_repeated_and_then_refused(drives, monkeypatch):
    stub, pauses = Stub(median_tpot=3e-6), []
    monkeypatch.setattr(vllm_serving.time, "sleep", pauses.append)
    with pytest.raises(SparseRTError, match="arrived in one piece, 5 times.*a larger model"):
        drives(stub).drive(1.0, seed=5)
    assert stub.seeds == [5] * 5 and pauses == [0, *vllm_serving.PAUSES]


def test_every_pair_has_its_own_seed_and_both_sides_share_it(drives):
    stub = Stub()
    for _ in ("dense", "sparse"):
        drive = drives(stub).at(1.0)
        assert drive()["output_throughput"] == 2.0 / 8  # seconds an output token
        drive()
    assert stub.seeds == [1, 2, 1, 2]


def test_the_chart_shows_the_sweep(tmp_path):
    rows = [
        Row("vllm", "serve", metric, "s", [2.0], [1.0], tokens=1, request_rate=rate, metric=metric).to_dict()
        for rate in (float("inf"), 1.0)
        for metric in METRICS
    ]
    panels = sweep_panels(rows)
    assert [panel.title for panel in panels] == [title for title, *_ in SWEEP_PANELS]
    assert all(panel.ticks == ["1", "inf"] for panel in panels)
    assert panels[0].lines == {"dense": [0.5, 0.5], "sparse": [1.0, 1.0]}
    assert panels[1].lines["sparse, p99"] == [1.0, 1.0] and len(panels[1].lines) == 4
    bar_chart(tmp_path / "chart.png", ["a"], [1.0], "title", "axis", panels=panels)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert sweep_panels([Row("hf", "decode", "step", "s", [1.0], [1.0]).to_dict()]) == []
