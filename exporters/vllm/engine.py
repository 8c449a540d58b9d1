"""A real vLLM engine in a process of its own: what the exporter's check, the demo and the benchmark call.

One process for one folder, the engine core inside it: errors keep their own text, settings that vLLM reads once from
the environment do not leak into the caller, and the memory is free afterwards. Dense folders run the same way.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_rt.errors import SparseRTError, UserError

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
    """Start vLLM on ``folder`` and run ``jobs`` one after the other.

    A job is ``{"prompts", "max_tokens"}`` and optionally ``repeats`` (timed runs after one that is not; default one run
    without a warm-up) and ``ignore_eos``; its result has ``tokens``, ``prompt_tokens``, ``generate_s`` (the median) and
    ``runs_s``. ``options`` go to ``vllm.LLM``. ``UserError`` for a folder that vLLM refuses, ``SparseRTError`` for any
    other failure.
    """
    request = {
        "folder": str(folder),
        "jobs": list(jobs),
        "options": {"enforce_eager": enforce_eager, **(options or {})},
    }
    with tempfile.TemporaryDirectory(prefix="sparse-rt-vllm-") as scratch:
        paths = [Path(scratch) / name for name in ("request.json", "response.json", "log.txt")]
        paths[0].write_text(json.dumps(request))
        command = [sys.executable, "-m", "sparse_rt.exporters.vllm.engine", str(paths[0]), str(paths[1])]
        environment = {**ENVIRONMENT, **os.environ, **(env or {})}
        with paths[2].open("w") as log:
            try:
                subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=TIMEOUT_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                raise SparseRTError(f"vLLM did not finish with {folder} in {TIMEOUT_SECONDS} seconds") from None
        if not paths[1].is_file():
            tail = " | ".join(paths[2].read_text().strip().splitlines()[-3:])
            raise SparseRTError(f"the vLLM process died on {folder}: {tail or 'it said nothing'}")
        response = json.loads(paths[1].read_text())
    if "error" in response:
        kind = UserError if response["bad_input"] else SparseRTError
        raise kind(f"vLLM could not serve {folder}: {response['error']}")
    return response


def run_here(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request in this process and take the engine down again; raises what vLLM raises."""
    jobs = [dict(job) for job in request["jobs"]]
    _encode(request["folder"], jobs)
    longest = max(max(map(len, job["prompts"])) + job["max_tokens"] for job in jobs)
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    engine = None
    try:
        start = time.perf_counter()
        engine = vllm.LLM(request["folder"], **{"max_model_len": longest, **request["options"]})
        load_seconds = time.perf_counter() - start
        return {
            "engine": f"vllm {vllm.__version__}",
            "platform": type(current_platform).__name__,
            "load_s": round(load_seconds, 3),
            "jobs": [_run_job(engine, job) for job in jobs],
        }
    finally:
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()


def _run_job(engine, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=job.get("ignore_eos", False), detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    repeats = job.get("repeats")
    if repeats:
        engine.generate(prompts, sampling, use_tqdm=False)
    seconds = []
    for _ in range(repeats or 1):
        start = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds.append(round(time.perf_counter() - start, 6))
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "prompt_tokens": [len(ids) for ids in job["prompts"]],
        "generate_s": statistics.median(seconds),
        "runs_s": seconds,
    }


def _encode(folder: str, jobs: list[dict[str, Any]]) -> None:
    """Replace texts by token ids, in place, with the tokenizer that lies beside the weights."""
    if any(isinstance(prompt, str) for job in jobs for prompt in job["prompts"]):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        for job in jobs:
            job["prompts"] = [tokenizer(p)["input_ids"] if isinstance(p, str) else list(p) for p in job["prompts"]]


def explain_failure(error: Exception) -> dict[str, Any]:
    """What ``run_engine`` reports of a failure: its text in one line, and whether the input was at fault."""
    if hasattr(error, "errors"):  # pydantic wraps what our checks raise while vLLM validates its configuration
        causes = [problem.get("ctx", {}).get("error") for problem in error.errors()]
        error = next((cause for cause in causes if isinstance(cause, Exception)), error)
    return {"error": " ".join(str(error).split()), "bad_input": isinstance(error, ValueError)}


def main(request_path: str, response_path: str) -> None:
    """The process that ``run_engine`` starts."""
    try:
        response = run_here(json.loads(Path(request_path).read_text()))
    except Exception as error:
        response = explain_failure(error)
    Path(response_path).write_text(json.dumps(response))


if __name__ == "__main__":
    main(*sys.argv[1:])
