"""vLLM: one engine a side, both kept and used in turn, with the same thread binding and settings.

The phase ``serve`` starts OpenAI servers instead (``vllm_serving``).

Time of a decode step = extra time / extra tokens between generating one token and generating many, so that the
scheduler's fixed costs and the prompt cancel out.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from pathlib import Path

import torch

from sparse_rt.benchmarking import vllm_serving
from sparse_rt.benchmarking.models import Pair, read_files
from sparse_rt.benchmarking.processes import largest_process, status_bytes, wait_until_idle
from sparse_rt.benchmarking.rows import SIDES, Row, calls_note, generation_rows, in_turn
from sparse_rt.benchmarking.weights import FILE_VARIABLE, WORKER, LoadedWeights, recorded
from sparse_rt.config import BenchOptions
from sparse_rt.errors import SparseRTError
from sparse_rt.exporters.vllm.engine import KeptEngine
from sparse_rt.progress import Progress
from sparse_rt.report import size

NAME = "vllm"
PHASES = ("load", "memory", "prefill", "decode", "serve")
BIND, CACHE_SPACE = "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"
MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"
# A sample repeats generations shorter than this: the scheduler's jitter is a few milliseconds a call.
SAMPLE_SECONDS = 1.0
MAX_CALLS = 5


def measure(pair: Pair, options: BenchOptions, phases: list[str], progress: Progress) -> tuple[list[Row], dict]:
    """Rows of the asked ``phases`` and the settings they were measured with."""
    environment = threading()
    settings = {
        "dtype": pair.dtype,
        "max_model_len": options.prompt_tokens + options.new_tokens,
        "enable_prefix_caching": False,
        # CUDA graphs are how vLLM is used on a GPU; on a CPU compiling costs a minute a start and helps both alike.
        "enforce_eager": not (options.compile or torch.cuda.is_available()),
    }
    if torch.cuda.is_available():
        settings["gpu_memory_utilization"] = 0.45  # two engines share the GPU
    rows, facts = [], {}
    if set(phases) - {"serve"}:
        offline = settings | {"skip_tokenizer_init": True}
        rows, facts = engine_rows(pair, options, phases, offline, environment, progress)
        facts |= offline | environment
    if "serve" in phases:
        served, found = vllm_serving.measure(pair, options, settings, environment, progress)
        rows, facts = rows + served, facts | found
    return rows, {"dense_linear": dense_linear(facts["platform"]), **facts}


def engine_rows(
    pair: Pair,
    options: BenchOptions,
    phases: list[str],
    settings: dict[str, object],
    environment: dict[str, str],
    progress: Progress,
) -> tuple[list[Row], dict[str, str]]:
    """Rows of everything but ``serve``, and the facts of the engines."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparse-rt-bench-")))
        weigh = {"worker_cls": WORKER} if {"load", "memory"} & set(phases) else {}
        engines = {}
        for side in SIDES:
            model = getattr(pair, side)
            read_files(header.file for header in model.headers)
            progress.stage(f"starting vLLM on the {side} model")
            variables = environment | {FILE_VARIABLE: str(folder / side)}
            engines[side] = stack.enter_context(KeptEngine(model.folder, settings | weigh, variables))
        rows = start_rows(engines, {side: recorded(folder / side) for side in SIDES}, phases)
        for batch in options.batch if {"prefill", "decode"} & set(phases) else []:
            rows += batch_rows(engines, batch, pair.vocabulary, options, phases, progress)
        return rows, {key: engines["dense"].facts[key] for key in ("engine", "platform")}


def dense_linear(platform: str) -> str:
    """What multiplies dense matrices in vLLM, by its platform class: not equally fast, so a report must say it."""
    return {"ZenCpuPlatform": "zentorch", "CpuPlatform": "oneDNN"}.get(platform, "as vLLM chooses")


def threading() -> dict[str, str]:
    """The environment of both engines: what the user set, otherwise as many threads as torch has here, not bound.

    The engine runs inside its process: with several (VLLM_ENABLE_V1_MULTIPROCESSING=1, what a server has) the scheduler
    and the polling of vLLM take their time from the same few cores, the same milliseconds from both models. Bound
    threads would stall whenever a neighbour has one of their cores.
    """
    default = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        BIND: "nobind",
        CACHE_SPACE: "1",
        MULTIPROCESSING: "0",
    }
    chosen = {name: os.environ[name] for name in (BIND, CACHE_SPACE, MULTIPROCESSING) if name in os.environ}
    return {**default, **chosen}


def start_rows(
    engines: dict[str, KeptEngine], weights: dict[str, LoadedWeights | None], phases: list[str]
) -> list[Row]:
    """Seconds of the start; bytes of the process that holds the weights, after one token, and of the weights alone."""
    rows = []
    weighed = [weights[side] for side in SIDES if weights[side] is not None]
    known = len(weighed) == len(SIDES)
    if "load" in phases:
        once = "one start each, files in the page cache"
        start = [[engines[side].facts["load_s"]] for side in SIDES]
        rows.append(Row(NAME, "load", "engine start", "s", *start, note=once))
        if known:
            seconds = [[found.seconds] for found in weighed]
            note = f"{once}; reading, checking and laying out in the worker"
            rows.append(Row(NAME, "load", "weights in the worker", "s", *seconds, note=note))
    if "memory" in phases:
        for engine in engines.values():
            engine.run({"prompts": [[1]], "max_tokens": 1})
        found = [[status_bytes("VmRSS", largest_process(engines[side].pid) or 0)] for side in SIDES]
        if all(size for (size,) in found):
            note = "resident bytes of the process that holds the weights, Python and libraries included"
            rows.append(Row(NAME, "memory", "engine after one token", "bytes", *found, note=note))
        if known and all(found.held > 0 for found in weighed):
            held = [[found.held] for found in weighed]
            rows.append(Row(NAME, "memory", "weights in the worker", "bytes", *held, note=weights_note(*weighed)))
    return rows


def weights_note(dense: LoadedWeights, sparse: LoadedWeights) -> str:
    """What the figure is, and what the tensors of the models would have told."""
    how = "allocated on the GPU" if torch.cuda.is_available() else "of anonymous memory"
    return (
        f"bytes {how} that the worker gained while it loaded the weights, before the KV cache exists; what loading "
        f"imports is part of it. Parameters and buffers are {size(dense.tensors)} dense and {size(sparse.tensors)} "
        "sparse, without dense weights that vLLM repacked (oneDNN, zentorch), the head among them on both sides"
    )


def batch_rows(
    engines: dict[str, KeptEngine],
    batch: int,
    vocabulary: int,
    options: BenchOptions,
    phases: list[str],
    progress: Progress,
) -> list[Row]:
    """Prefill and decode at one batch size, from the same generations."""
    sides = {side: Generation(engines, side, batch, vocabulary, options) for side in SIDES}
    decode = "decode" in phases
    calls = calls_for(max(generation.warm_up(decode) for generation in sides.values()))
    samples = in_turn(
        lambda: sides["dense"].sample(calls, decode),
        lambda: sides["sparse"].sample(calls, decode),
        options.repeats,
        progress,
        f"vLLM: prefill and decode, batch {batch}",
    )
    rows = generation_rows(NAME, *samples, batch, options, calls_note(calls))
    return [row for row in rows if row.phase in phases]


def calls_for(seconds: float) -> int:
    return max(1, min(MAX_CALLS, round(SAMPLE_SECONDS / max(seconds, 1e-6))))


class Generation:
    """Greedy generation of one engine from fixed random prompts."""

    def __init__(self, engines: dict[str, KeptEngine], side: str, batch: int, vocabulary: int, options: BenchOptions):
        self.engine = engines[side]
        self.others = [engine for name, engine in engines.items() if name != side]
        generator = random.Random(0)
        length, self.new_tokens = options.prompt_tokens, options.new_tokens
        self.prompts = [[generator.randrange(vocabulary) for _ in range(length)] for _ in range(batch)]

    def seconds(self, new_tokens: int, calls: int) -> float:
        job = {"prompts": self.prompts, "max_tokens": new_tokens, "repeats": calls, "ignore_eos": True}
        return self.engine.run(job)["generate_s"]

    def warm_up(self, decode: bool) -> float:
        """Seconds of the longest generation of a sample."""
        self.seconds(2, 1)
        return self.seconds(self.new_tokens if decode else 1, 1)

    def sample(self, calls: int, decode: bool) -> tuple[float, float]:
        """Median seconds to the first token, and of a further step (0.0 without ``decode``), over ``calls`` calls."""
        for engine in self.others:
            # A worker of vLLM polls for a second after its last step, on the cores that this engine is bound to.
            wait_until_idle(engine.pid)
        self.engine.run({"prompts": [[1]], "max_tokens": 2})  # wakes this engine, which has been idle for a turn
        short = self.seconds(1, calls)
        if not decode:
            return short, 0.0
        extra = self.seconds(self.new_tokens, calls) - short
        if extra <= 0:
            raise SparseRTError(
                f"vLLM took no longer for {self.new_tokens} tokens than for one: the machine is too busy to measure; "
                "raise --new-tokens or try again later"
            )
        return short, extra / (self.new_tokens - 1)
