"""vLLM: one fresh engine a sample, dense and sparse in turn, with the same thread binding and settings.

Time of a decode step = extra time / extra tokens between generating one token and generating many, so that the
scheduler's fixed costs and the prompt cancel out.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch

from sparse_rt.benchmarking.models import Pair
from sparse_rt.benchmarking.rows import Row, generation_rows, in_turn
from sparse_rt.config import BenchOptions
from sparse_rt.errors import SparseRTError
from sparse_rt.exporters.vllm.engine import run_engine
from sparse_rt.progress import Progress

NAME = "vllm"
PHASES = ("load", "prefill", "decode")
BIND, CACHE_SPACE = "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"
# Left alone, vLLM keeps one core free for its scheduler: harmless on a server, half of a machine with two cores.
FEW_CORES = 8
# Timed generations of one engine and length, after one that is not; their median is the sample.
CALLS = 5


def measure(pair: Pair, options: BenchOptions, phases: list[str], progress: Progress) -> tuple[list[Row], dict]:
    """Rows of the asked ``phases`` and the settings they were measured with."""
    environment = threading()
    settings = {
        "dtype": pair.dtype,
        "max_model_len": options.prompt_tokens + options.new_tokens,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    # CUDA graphs are how vLLM is used on a GPU; on a CPU compiling costs a minute a start and helps both sides alike.
    eager = not torch.cuda.is_available()
    batches = options.batch if {"prefill", "decode"} & set(phases) else []
    jobs = [job for batch in batches for job in batch_jobs(batch, pair.vocabulary, options)]

    def engine(side: str) -> Callable[[], dict[str, Any]]:
        folder = getattr(pair, side).folder.absolute()
        return lambda: run_engine(folder, jobs or [warm_up()], enforce_eager=eager, env=environment, options=settings)

    dense, sparse = in_turn(engine("dense"), engine("sparse"), options.repeats, progress, "vLLM, one engine a sample")
    rows = []
    if "load" in phases:
        start = [[sample["load_s"] for sample in samples] for samples in (dense, sparse)]
        rows.append(Row(NAME, "load", "engine start", "s", *start, note="one fresh engine a sample"))
    for index, batch in enumerate(batches):
        samples = [[batch_sample(sample["jobs"], index, options) for sample in side] for side in (dense, sparse)]
        note = f"one fresh engine a sample, the median of {CALLS} calls"
        rows += [row for row in generation_rows(NAME, *samples, batch, options, note) if row.phase in phases]
    # The platform tells the dense path on a CPU: ZenCpuPlatform multiplies with zentorch, CpuPlatform with oneDNN.
    facts = {key: dense[0][key] for key in ("engine", "platform")}
    return rows, {**facts, "enforce_eager": eager, **settings, **environment}


def threading() -> dict[str, str]:
    """The environment of both engines: what the user set, otherwise as many threads as torch has here.

    With one thread the engine runs inside its process: nothing is bound, and busy neighbours do no more harm than to
    torch. With several they are bound, as vLLM does; a neighbour on one of the cores then stalls every step.
    """
    environment = {name: os.environ[name] for name in (BIND, CACHE_SPACE) if name in os.environ}
    environment.setdefault(CACHE_SPACE, "1")
    threads = torch.get_num_threads()
    if threads == 1:
        return {**environment, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if 0 < len(cores) <= FEW_CORES:
        environment.setdefault(BIND, ",".join(map(str, cores[:threads])))
    return {BIND: "auto", **environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def warm_up() -> dict[str, Any]:
    return {"prompts": [[1]], "max_tokens": 1}


def batch_jobs(batch: int, vocabulary: int, options: BenchOptions) -> list[dict[str, Any]]:
    """One token and ``new_tokens`` tokens after the same random prompts."""
    generator = random.Random(0)
    prompts = [[generator.randrange(vocabulary) for _ in range(options.prompt_tokens)] for _ in range(batch)]
    lengths = (1, options.new_tokens)
    return [{"prompts": prompts, "max_tokens": n, "repeats": CALLS, "ignore_eos": True} for n in lengths]


def batch_sample(jobs: list[dict[str, Any]], index: int, options: BenchOptions) -> tuple[float, float]:
    """(seconds to the first token, seconds of a further step) of the ``index``-th batch."""
    short, long = jobs[2 * index]["runs_s"], jobs[2 * index + 1]["runs_s"]
    extra = statistics.median(long) - statistics.median(short)
    if extra <= 0:
        raise SparseRTError(
            f"vLLM took no longer for {options.new_tokens} tokens than for one: the machine is too busy to measure; "
            "raise --new-tokens or try again later"
        )
    return statistics.median(short), extra / (options.new_tokens - 1)
