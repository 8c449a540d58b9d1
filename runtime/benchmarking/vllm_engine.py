"""vLLM: one fresh engine a sample, dense and sparse in turn, with the same thread binding and settings.

Time of a decode step = extra time / extra tokens between generating one token and generating many, so that the
scheduler's fixed costs and the prompt cancel out.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from sparse_rt.benchmarking.models import Pair
from sparse_rt.benchmarking.rows import Row, calls_for, generation_rows, in_turn
from sparse_rt.benchmarking.worker import in_fresh_process
from sparse_rt.config import BenchOptions
from sparse_rt.errors import SparseRTError
from sparse_rt.progress import Progress

NAME = "vllm"
PHASES = ("load", "prefill", "decode")
BIND, CACHE_SPACE = "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"
# Left alone, vLLM keeps one core free for its scheduler: harmless on a server, half of a machine with two cores.
FEW_CORES = 8
MIN_CALLS = 3


def measure(pair: Pair, options: BenchOptions, phases: list[str], progress: Progress) -> tuple[list[Row], dict]:
    """Rows of the asked ``phases`` and the settings they were measured with."""
    environment = binding(dict(os.environ))
    settings = {
        "dtype": pair.dtype,
        "max_model_len": options.prompt_tokens + options.new_tokens,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }

    def engine(side: str) -> Callable[[], dict[str, Any]]:
        request = {
            "folder": str(getattr(pair, side).folder.absolute()),
            "settings": settings,
            "vocabulary": pair.vocabulary,
            "batch": options.batch if {"prefill", "decode"} & set(phases) else [],
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
        }
        return lambda: in_fresh_process("sparse_rt.benchmarking.vllm_engine:run_engine", request, environment)

    dense, sparse = in_turn(engine("dense"), engine("sparse"), options.repeats, progress, "vLLM, one engine a sample")
    rows = []
    if "load" in phases:
        start = [[sample["start"] for sample in samples] for samples in (dense, sparse)]
        rows.append(Row(NAME, "load", "engine start", "s", *start, note="one fresh engine a sample"))
    for index, batch in enumerate(options.batch if dense[0]["batches"] else []):
        samples = [[tuple(sample["batches"][index]) for sample in side] for side in (dense, sparse)]
        note = "one fresh engine a sample, the median of its calls"
        rows += [row for row in generation_rows(NAME, *samples, batch, options, note) if row.phase in phases]
    return rows, {**settings, **dense[0]["facts"], BIND: environment.get(BIND), CACHE_SPACE: environment[CACHE_SPACE]}


def binding(environment: dict[str, str]) -> dict[str, str]:
    """The environment of both engines: what the user set, otherwise all of few cores and a small cache."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if 0 < len(cores) <= FEW_CORES:
        environment.setdefault(BIND, ",".join(map(str, cores)))
    environment.setdefault(CACHE_SPACE, "1")
    return environment


def run_engine(request: dict[str, Any]) -> dict[str, Any]:
    """Start one engine and time it; runs inside ``worker``."""
    from vllm import LLM, __version__
    from vllm.platforms import current_platform

    # CUDA graphs are how vLLM is used on a GPU; on a CPU compiling costs a minute a start and helps both sides alike.
    eager = current_platform.is_cpu()
    begin = time.perf_counter()
    llm = LLM(request["folder"], enforce_eager=eager, **request["settings"])
    start = time.perf_counter() - begin
    lengths = request["prompt_tokens"], request["new_tokens"]
    batches = [time_batch(llm, batch, *lengths, request["vocabulary"]) for batch in request["batch"]]
    # The platform tells the dense path on a CPU: ZenCpuPlatform multiplies with zentorch, CpuPlatform with oneDNN.
    facts = {"vllm": __version__, "platform": type(current_platform).__name__, "enforce_eager": eager}
    return {"start": start, "batches": batches, "facts": facts}


def time_batch(llm: Any, batch: int, prompt_tokens: int, new_tokens: int, vocabulary: int) -> tuple[float, float]:
    """Median seconds until the first token, and seconds a further decode step."""
    from vllm import SamplingParams

    generator = random.Random(0)

    def seconds(count: int) -> float:
        prompts = [
            {"prompt_token_ids": [generator.randrange(vocabulary) for _ in range(prompt_tokens)]} for _ in range(batch)
        ]
        parameters = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, parameters, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(2)
    calls = max(MIN_CALLS, calls_for(seconds(1)))
    pairs = [(seconds(1), seconds(new_tokens)) for _ in range(calls)]
    step = statistics.median((long - short) / (new_tokens - 1) for short, long in pairs)
    if step <= 0:
        raise SparseRTError(
            f"vLLM took no longer for {new_tokens} tokens than for one: the machine is too busy to measure; "
            "raise --new-tokens or try again later"
        )
    return statistics.median(short for short, _ in pairs), step
