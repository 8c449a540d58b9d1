"""vLLM's own load generator (what ``vllm bench serve`` runs), in a process of its own beside the servers."""

from __future__ import annotations

import asyncio
import random
from typing import Any


class LoadGenerator:
    """Sends requests of random token ids to an OpenAI server; ``Child`` keeps it, for importing vLLM takes seconds."""

    def about(self) -> dict[str, str]:
        """``engine`` with its version and ``platform``, the class that chooses the dense path, as in the server."""
        import vllm
        from vllm.platforms import current_platform

        return {"engine": f"vllm {vllm.__version__}", "platform": type(current_platform).__name__}

    def drive(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send ``requests`` requests at ``request_rate`` a second ("inf": all at once) and wait for the last answer.

        ``job`` further holds ``url``, ``model`` (its name there), ``folder`` (for the tokenizer), ``vocabulary``,
        ``prompt_tokens``, ``new_tokens`` and ``seed``, which decides the prompts and the times of arrival. The result:
        ``completed``, ``output_tokens`` of each request, ``duration`` (s), ``median_ttft``, ``p99_ttft``,
        ``median_tpot``, ``p99_tpot`` (s) as vLLM forms them, and ``errors`` of requests that failed.
        """
        import numpy as np
        from vllm.benchmarks.datasets import SampleRequest
        from vllm.benchmarks.serve import TaskType, benchmark
        from vllm.tokenizers import get_tokenizer

        generator = random.Random(job["seed"])
        length = job["prompt_tokens"]
        requests = [
            SampleRequest([generator.randrange(job["vocabulary"]) for _ in range(length)], length, job["new_tokens"])
            for _ in range(job["requests"])
        ]
        np.random.seed(job["seed"])  # vLLM draws the times of arrival from numpy's global generator
        unused = dict.fromkeys(("logprobs", "max_concurrency", "lora_modules", "extra_headers"))
        found = asyncio.run(
            benchmark(
                **unused,
                task_type=TaskType.GENERATION,
                endpoint_type="openai",
                api_url=f"{job['url']}/v1/completions",
                base_url=job["url"],
                model_id=job["model"],
                model_name=job["model"],
                tokenizer=get_tokenizer(job["folder"]),
                input_requests=requests,
                request_rate=float(job["request_rate"]),
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=1,  # wakes a server that has been idle for a turn
                profile=False,
                selected_percentile_metrics=["ttft", "tpot"],
                selected_percentiles=[99.0],
                ignore_eos=True,
                goodput_config_dict={},
                extra_body={"temperature": 0},
                ready_check_timeout_sec=0,
            )
        )
        times = {name: found[f"{name}_ms"] / 1000 for name in ("median_ttft", "p99_ttft", "median_tpot", "p99_tpot")}
        return {
            "completed": found["completed"],
            "duration": found["duration"],
            "output_tokens": found["output_lens"],
            "errors": list(dict.fromkeys(error.strip().splitlines()[-1] for error in found["errors"] if error.strip())),
            **{name: float(value) for name, value in times.items()},
        }
