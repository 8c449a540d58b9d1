"""vLLM: one engine a side, both kept and used in turn, with the same thread binding and settings.

Time of a decode step = extra time / extra tokens between generating one token and generating many, so that the
scheduler's fixed costs and the prompt cancel out.
"""

from __future__ import annotations

import contextlib
import os
import random

import torch

from sparse_rt.benchmarking.models import Pair, read_files
from sparse_rt.benchmarking.processes import largest_process, status_bytes, wait_until_idle
from sparse_rt.benchmarking.rows import SIDES, Row, calls_note, generation_rows, in_turn
from sparse_rt.config import BenchOptions
from sparse_rt.errors import SparseRTError
from sparse_rt.exporters.vllm.engine import KeptEngine
from sparse_rt.progress import Progress

NAME = "vllm"
PHASES = ("load", "memory", "prefill", "decode")
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
        "skip_tokenizer_init": True,
        # CUDA graphs are how vLLM is used on a GPU; on a CPU compiling costs a minute a start and helps both alike.
        "enforce_eager": not torch.cuda.is_available(),
    }
    with contextlib.ExitStack() as stack:
        engines = {}
        for side in SIDES:
            folder = getattr(pair, side)
            read_files(header.file for header in folder.headers)
            progress.stage(f"starting vLLM on the {side} model")
            engines[side] = stack.enter_context(KeptEngine(folder.folder, settings, environment))
        rows = start_rows(engines, phases)
        for batch in options.batch if {"prefill", "decode"} & set(phases) else []:
            rows += batch_rows(engines, batch, pair.vocabulary, options, phases, progress)
        facts = {key: engines["dense"].facts[key] for key in ("engine", "platform")}
    return rows, {**facts, "dense_linear": dense_linear(facts["platform"]), **settings, **environment}


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


def start_rows(engines: dict[str, KeptEngine], phases: list[str]) -> list[Row]:
    """Seconds of the start and bytes of the process that holds the weights, after one token."""
    rows = []
    if "load" in phases:
        start = [[engines[side].facts["load_s"]] for side in SIDES]
        rows.append(Row(NAME, "load", "engine start", "s", *start, note="one start each, files in the page cache"))
    if "memory" in phases:
        for engine in engines.values():
            engine.run({"prompts": [[1]], "max_tokens": 1})
        found = [[status_bytes("VmRSS", largest_process(engines[side].pid) or 0)] for side in SIDES]
        if all(size for (size,) in found):
            note = "resident bytes of the process that holds the weights, Python and libraries included"
            rows.append(Row(NAME, "memory", "engine after one token", "bytes", *found, note=note))
    return rows


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
