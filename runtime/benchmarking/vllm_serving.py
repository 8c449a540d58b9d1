"""vLLM's OpenAI server under load: both sides at several request rates, driven by vLLM's own load generator.

Both servers stay up, with the same settings and thread binding, and only one is asked at a time; before that the other
must be idle. The requests of a pair are the same on both sides: the same prompts of random tokens at the same times.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

from sparse_rt.benchmarking.models import Pair, read_files
from sparse_rt.benchmarking.openai_server import HOST, SERVED_NAME, OpenAIServer, compute_cores
from sparse_rt.benchmarking.processes import wait_until_idle
from sparse_rt.benchmarking.rows import SIDES, Row, in_turn
from sparse_rt.child import Child
from sparse_rt.config import BenchOptions
from sparse_rt.errors import SparseRTError
from sparse_rt.exporters.vllm.engine import ENVIRONMENT
from sparse_rt.progress import Progress

NAME = "vllm"
BIND, MULTIPROCESSING = "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING"
DRIVE_SECONDS = 3600
# The front process of vLLM sends nothing while the next token is there before it has dealt with the last: where others
# take its cores and a step is short, an answer goes out whole, its tokens microseconds apart; no model is as fast as
# this (s a token). Such a drive tells nothing and is repeated, later each time, for it lasts as long as the others do.
ONE_PIECE_SECONDS, PAUSES = 1e-4, (1, 2, 4, 8)
# Field of a drive, and what a reader calls it. Throughput first: as seconds an output token, lower is better like all.
METRICS = {
    "output_throughput": "output tokens a second",
    "median_ttft": "time to first token, median",
    "p99_ttft": "time to first token, p99",
    "median_tpot": "time per output token, median",
    "p99_tpot": "time per output token, p99",
}


def measure(
    pair: Pair, options: BenchOptions, settings: dict[str, Any], environment: dict[str, str], progress: Progress
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the start and of the sweep, and the facts of what served.

    ``settings`` are fields of vLLM's engine, ``environment`` what the offline engines run with; the servers differ in
    what ``server_environment`` says.
    """
    arguments, variables = server_arguments(settings), server_environment(environment)
    with contextlib.ExitStack() as stack:
        generator = stack.enter_context(Child("vLLM's load generator", loopback(variables)))
        generator.make("sparse_rt.benchmarking.load_generator:LoadGenerator")
        facts = generator.ask("about")
        servers = {}
        for side in SIDES:
            folder = getattr(pair, side)
            read_files(header.file for header in folder.headers)
            progress.stage(f"starting the OpenAI server of the {side} model")
            servers[side] = stack.enter_context(OpenAIServer(folder.folder, arguments, variables))
        note = "one start each, from the process to the first healthy answer; imports and files in the page cache"
        start = [[servers[side].start_s] for side in SIDES]
        rows = [Row(NAME, "serve", "server start", "s", *start, note=note)]
        sides = {side: Drives(generator, servers, side, pair.vocabulary, options) for side in SIDES}
        for side in sides.values():
            side.warm_up()
        for rate in dict.fromkeys(options.request_rate):
            rows += rate_rows(sides, rate, options, progress)
    return rows, {
        **facts,
        "server": " ".join(arguments),
        "server_environment": ", ".join(f"{name}={variables[name]}" for name in environment),
    }


def server_arguments(settings: dict[str, Any]) -> list[str]:
    """Engine fields as options of the server."""
    words = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    # Sampling settings of the folder must not decide how long an answer is, the log of requests not how fast it comes.
    return [*words, "--generation-config", "vllm", "--disable-uvicorn-access-log"]


def server_environment(environment: dict[str, str]) -> dict[str, str]:
    """``environment`` as a server has it: the engine in processes of its own, and then threads are bound to cores."""
    chosen = {name: os.environ[name] for name in (BIND, MULTIPROCESSING) if name in os.environ}
    cores = compute_cores(int(environment["OMP_NUM_THREADS"]))
    return {**ENVIRONMENT, **os.environ, **environment, BIND: cores, MULTIPROCESSING: "1", **chosen}


def loopback(environment: dict[str, str]) -> dict[str, str]:
    """``environment`` in which the load generator asks this machine itself, not a proxy for it."""
    direct = ",".join(filter(None, (environment.get("NO_PROXY") or environment.get("no_proxy"), HOST)))
    return {**environment, "NO_PROXY": direct, "no_proxy": direct}


def rate_rows(sides: dict[str, Drives], rate: float, options: BenchOptions, progress: Progress) -> list[Row]:
    """A row for every metric at one request rate."""
    samples = in_turn(
        sides["dense"].at(rate),
        sides["sparse"].at(rate),
        options.repeats,
        progress,
        f"OpenAI servers: {rate:g} requests a second",
    )
    note = (
        f"{options.num_prompts} requests of {options.prompt_tokens} + {options.new_tokens} tokens each sample; "
        "the same prompts and times of arrival on both sides of a pair; a server that keeps up gives out as many "
        "tokens a second as are asked for, however fast it is"
    )
    rows = []
    for metric, words in METRICS.items():
        values = [[sample[metric] for sample in side] for side in samples]
        tokens = 1 if metric == "output_throughput" else None
        named = f"rate {rate:g}: {words}"
        rows.append(Row(NAME, "serve", named, "s", *values, tokens=tokens, note=note, request_rate=rate, metric=metric))
    return rows


class Drives:
    """The load generator against one of the servers; every drive has the next seed, so pairs share theirs."""

    def __init__(
        self, generator: Child, servers: dict[str, OpenAIServer], side: str, vocabulary: int, options: BenchOptions
    ):
        self.generator, self.server, self.options = generator, servers[side], options
        self.others = [server for name, server in servers.items() if name != side]
        self.job = {
            "url": f"http://{HOST}:{self.server.port}",
            "model": SERVED_NAME,
            "folder": str(self.server.folder.absolute()),
            "vocabulary": vocabulary,
            "requests": options.num_prompts,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
        }

    def warm_up(self) -> None:
        """Everything at once: what a server prepares for a number of tokens it has then prepared."""
        self.drive(float("inf"), seed=0)

    def at(self, rate: float) -> Callable[[], dict[str, float]]:
        seeds = itertools.count(1)
        return lambda: self.drive(rate, next(seeds))

    def drive(self, rate: float, seed: int) -> dict[str, float]:
        """The ``METRICS`` (s) of one drive; ``SparseRTError`` unless every request got all its tokens, one by one."""
        for server in self.others:
            # A worker of vLLM polls for a while after its last step, on the cores that this server computes on.
            wait_until_idle(server.session)
        for pause in (0, *PAUSES):
            time.sleep(pause)
            found = self._answers({**self.job, "request_rate": rate, "seed": seed})
            if found["median_tpot"] >= ONE_PIECE_SECONDS:
                return {**found, "output_throughput": found["duration"] / sum(found["output_tokens"])}
        raise SparseRTError(
            f"most answers of the OpenAI server for {self.server.folder} arrived in one piece, "
            f"{1 + len(PAUSES)} times: other processes leave the server too little time for a model as fast as this; "
            "end them or take a larger model"
        )

    def _answers(self, job: dict[str, Any]) -> dict[str, Any]:
        found = self.generator.ask("drive", job, timeout=DRIVE_SECONDS)
        self.server.check()
        asked, got = job["requests"], found["output_tokens"]
        if found["completed"] != asked:
            reason = "; ".join(found["errors"][:2]) or "no reason given"
            raise SparseRTError(
                f"{asked - found['completed']} of {asked} requests to the OpenAI server for {self.server.folder} "
                f"failed: {reason}"
            )
        if set(got) != {job["new_tokens"]}:
            raise SparseRTError(
                f"the OpenAI server for {self.server.folder} answered with {min(got)} to {max(got)} tokens where "
                f"{job['new_tokens']} were asked for"
            )
        return found
