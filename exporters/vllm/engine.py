"""A real vLLM engine in a process of its own: what the exporter's check, the demo and the benchmark call.

One process for one folder, the engine core inside it unless the caller says otherwise: errors keep their own text, and
settings that vLLM reads once from the environment do not leak into the caller. Dense folders run the same way.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparse_rt.child import Child
from sparse_rt.errors import SparseRTError, UserError
from sparse_rt.exporters.vllm.failures import failure

Prompt = str | Sequence[int]

# Used where neither the caller nor the environment says otherwise. Without OMP_NUM_THREADS=1 the engine core shares
# its cores with spinning OpenMP threads (ten times slower on two cores); without KVCACHE_SPACE vLLM on a CPU takes
# 92% of the memory. A caller that measures speed passes its own thread settings.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
TIMEOUT_SECONDS = 1800


def generate_tokens(
    folder: str | Path,
    prompts: Sequence[Prompt],
    max_tokens: int,
    enforce_eager: bool = True,
    env: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Continue ``prompts`` (texts or token ids) greedily, all in one batch, up to ``max_tokens`` tokens each.

    Returns ``tokens`` (a list of token ids for each prompt), ``prompt_tokens`` (their numbers), ``load_s`` (building
    the engine), ``generate_s``, ``engine`` and ``platform``. Errors and ``options`` as ``run_engine``; mind that vLLM
    runs a float32 folder in bfloat16 unless ``options`` has a ``dtype``.
    """
    job = {"prompts": list(prompts), "max_tokens": max_tokens}
    result = run_engine(folder, [job], enforce_eager=enforce_eager, env=env, options=options)
    return {**result, **result.pop("jobs")[0]}


def run_engine(
    folder: str | Path,
    jobs: Sequence[dict[str, Any]],
    enforce_eager: bool = True,
    env: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Start vLLM on ``folder``, run ``jobs`` one after the other (``Engine.run``) and stop it.

    ``options`` go to ``vllm.LLM``. Returns ``Engine.facts`` and the results as ``jobs``. ``UserError`` for a folder
    that vLLM refuses, ``SparseRTError`` for any other failure.
    """
    request = {
        "folder": _path(folder),
        "jobs": list(jobs),
        "options": {"enforce_eager": enforce_eager} | (options or {}),
    }
    with Child(f"vLLM on {folder}", _environment(env)) as child:
        return child.call(f"{__name__}:serve_once", request, timeout=TIMEOUT_SECONDS)


class KeptEngine:
    """vLLM in a process of its own that stays, for callers that come back with more jobs; a context manager.

    ``options`` go to ``vllm.LLM`` and must hold ``max_model_len``; errors as ``run_engine``. ``facts`` is that of
    ``Engine``, ``pid`` the session of all its processes.
    """

    def __init__(self, folder: str | Path, options: dict[str, Any], env: dict[str, str] | None = None):
        self._child = Child(f"vLLM on {folder}", _environment(env))
        try:
            self._child.make(f"{__name__}:ServingEngine", _path(folder), options, timeout=TIMEOUT_SECONDS)
            self.facts = self._child.ask("about", timeout=TIMEOUT_SECONDS)
        except BaseException:
            self._child.close()
            raise
        self.pid = self._child.pid

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """``Engine.run``"""
        return self._child.ask("run", job, timeout=TIMEOUT_SECONDS)

    def __enter__(self) -> KeptEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()


def _path(folder: str | Path) -> str:
    return str(Path(folder).absolute())


def _environment(env: dict[str, str] | None) -> dict[str, str]:
    return {**ENVIRONMENT, **os.environ, **(env or {})}


class Engine:
    """vLLM in this process; raises what vLLM raises.

    ``facts``: ``engine`` (with its version), ``platform`` (the class that chooses the dense path) and ``load_s``.
    """

    def __init__(self, folder: str, options: dict[str, Any]):
        import vllm
        from vllm.platforms import current_platform

        start = time.perf_counter()
        try:
            self._llm = vllm.LLM(folder, **options)
        except BaseException:
            _clean_up()
            raise
        self.facts = {
            "engine": f"vllm {vllm.__version__}",
            "platform": type(current_platform).__name__,
            "load_s": round(time.perf_counter() - start, 3),
        }

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Greedy continuations of a batch.

        ``job``: ``prompts`` (token ids), ``max_tokens`` and optionally ``repeats`` (timed runs, default 1) and
        ``ignore_eos``; the result: ``tokens``, ``prompt_tokens``, ``generate_s`` (the median) and ``runs_s``.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=job["max_tokens"], ignore_eos=job.get("ignore_eos", False), detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        seconds = []
        for _ in range(job.get("repeats", 1)):
            start = time.perf_counter()
            outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
            seconds.append(round(time.perf_counter() - start, 6))
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "prompt_tokens": [len(ids) for ids in job["prompts"]],
            "generate_s": statistics.median(seconds),
            "runs_s": seconds,
        }

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        _clean_up()


def _clean_up() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


class ServingEngine(Engine):
    """``Engine`` as ``KeptEngine`` talks to it: failures become sentences about the folder."""

    def __init__(self, folder: str, options: dict[str, Any]):
        self._folder = folder
        with _sentences_about(folder):
            super().__init__(folder, options)

    def about(self) -> dict[str, Any]:
        return self.facts

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        with _sentences_about(self._folder):
            return super().run(job)


def serve_once(request: dict[str, Any]) -> dict[str, Any]:
    """``run_here`` as ``run_engine`` talks to it."""
    with _sentences_about(request["folder"]):
        return run_here(request)


def run_here(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request in this process and take the engine down again; raises what vLLM raises."""
    jobs = [dict(job) for job in request["jobs"]]
    _encode(request["folder"], jobs)
    longest = max(max(map(len, job["prompts"])) + job["max_tokens"] for job in jobs)
    engine = Engine(request["folder"], {"max_model_len": longest, **request["options"]})
    try:
        return {**engine.facts, "jobs": [engine.run(job) for job in jobs]}
    finally:
        engine.close()


def _encode(folder: str, jobs: list[dict[str, Any]]) -> None:
    """Replace texts by token ids, in place, with the tokenizer that lies beside the weights."""
    if any(isinstance(prompt, str) for job in jobs for prompt in job["prompts"]):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        for job in jobs:
            job["prompts"] = [tokenizer(p)["input_ids"] if isinstance(p, str) else list(p) for p in job["prompts"]]


@contextlib.contextmanager
def _sentences_about(folder: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found = explain_failure(error)
        kind = UserError if found["bad_input"] else SparseRTError
        raise kind(f"vLLM could not serve {folder}: {found['error']}") from error


def explain_failure(error: Exception) -> dict[str, Any]:
    """What there is to report of a failure: its text in one line, and whether the input was at fault.

    An error of ours counts wherever it happened: under what vLLM wraps around it, or in a process of the engine.
    """
    found = failure(error)
    if found is not None:
        return {"error": found[0], "bad_input": found[1] == UserError.exit_code}
    return {"error": " ".join(str(error).split()), "bad_input": isinstance(error, ValueError)}
