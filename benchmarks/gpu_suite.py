"""Everything about the GPU kernels that only a GPU can tell, in one command that ends after eight minutes.

    python benchmarks/gpu_suite.py --output results                       # from the repository's root
    python benchmarks/gpu_suite.py --output results --install             # and use what was measured
    python benchmarks/gpu_suite.py --output results --group decode        # a part of it
    python benchmarks/gpu_suite.py --output out --dry-run --device cpu    # does it run; Triton's interpreter, no GPU
    python benchmarks/gpu_suite_report.py results/gpu_suite.jsonl         # the tables again

Needs torch >= 2.11, Triton >= 3.6, transformers, and nothing else but this repository, which need not be installed.

First every kernel is compared with float64 on the GPU (gpu_suite_checks.py), several groups of checks side by side.
Then layers are timed against cuBLAS in the same run (gpu_suite_speed.py), training steps against what they replace
(gpu_suite_cost.py), experts against dense ones (gpu_suite_experts.py), and a model generates (gpu_suite_generate.py).
The most important shapes come first; what the time does not suffice for is reported as skipped. A measurement appears
only if the result that was timed had been compared with float64.

Checks and timings force every kernel and the way without it, whatever the dispatch table of this GPU says. From what
was timed DIR/<gpu>.json is made (gpu_suite_table.py): the table that says for which products a kernel is used. The
model generates with it. --install puts it beside the others (kernels/triton/configs), for this machine and, committed,
for everybody.

Every group runs in a process of its own: an illegal access spoils a process for good. When one ends early, the task
that it was at becomes an error row and a new process goes on with the next task. DIR/gpu_suite.jsonl holds all rows as
they come, DIR/gpu_suite.md the tables. The exit status is 1 when there are error rows.
"""

from __future__ import annotations

import checkout  # isort: skip  # noqa: F401

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gpu_suite_report
import gpu_suite_table

# Group -> share of the time after which it ends at the latest. Checks run side by side, then the others in this order.
CHECKS = dict.fromkeys(
    (
        *("ops-2:4", "ops-unstructured", "ops-4:8", "packed-2:4", "packed-unstructured"),
        *("gradients", "experts-checks", "whole"),
    ),
    0.35,
)
SPEED = {
    "decode": 0.42,
    "prefill": 0.48,
    "training": 0.54,
    "cost": 0.62,
    "experts": 0.75,
    "generate": 0.89,
    "decode-more": 0.94,
    "prefill-more": 0.97,
    "training-more": 1.0,
}
FIRST, MORE = ("Llama-3-8B",), ("Llama-3.2-1B", "Llama-3-70B")
SIDE_BY_SIDE = 8
GRACE = 20.0  # seconds beyond its deadline after which a process is ended
MAX_RESTARTS = 30
BROKEN = 70  # exit status of a worker whose GPU context is spoiled
GENERATE = "generate"
KERNELS_VARIABLE = "SPARSE_RT_GPU_KERNELS"
ROWS, REPORT = "gpu_suite.jsonl", "gpu_suite.md"


def task_lists() -> dict[str, Callable]:
    """Group -> function from a context to its tasks; imported here because the parent process needs none of it."""
    checks = importlib.import_module("gpu_suite_checks")
    speed = importlib.import_module("gpu_suite_speed")
    generate = importlib.import_module("gpu_suite_generate")
    found = {name: partial(checks.tasks, group=name) for name in CHECKS}
    for kind in ("decode", "prefill", "training"):
        found[kind], found[f"{kind}-more"] = speed.tasks(kind, FIRST), speed.tasks(kind, MORE)
    cost = importlib.import_module("gpu_suite_cost")
    found["cost"] = partial(cost.tasks, models=("Llama-3-8B", "Llama-3.2-1B"))
    experts = importlib.import_module("gpu_suite_experts")
    found |= {"experts-checks": experts.check_tasks, "experts": experts.tasks}
    return {"environment": checks.environment, **found, GENERATE: generate.tasks}


def work(options: argparse.Namespace) -> int:
    """A worker process: the tasks of ``options.work`` from number ``options.start`` on; rows to standard output."""
    import torch
    from gpu_common import Context, gpu_is_broken, short

    lists = task_lists()
    device = torch.device(options.device)
    context = Context(device, options.dry_run, options.deadline, write)
    tasks = [(group, task) for group in options.work.split(",") for task in lists[group](context)]
    for number, (group, task) in enumerate(tasks[options.start :], options.start):
        if context.late():
            write({"kind": "skipped", "group": group, "task": task.name, "reason": "time"})
            continue
        write({"kind": "started", "group": group, "task": task.name, "number": number})
        start = time.monotonic()
        try:
            task.run(context)
        except Exception as error:
            write({"kind": "error", "group": group, "task": task.name, "error": short(error)})
            if gpu_is_broken(device):
                return BROKEN
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write({"kind": "done", "group": group, "task": task.name, "seconds": round(time.monotonic() - start, 2)})
    return 0


def write(row: dict) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


class Worker:
    """The process of one group (or of several, separated by commas), and the ones that follow when it ends early."""

    def __init__(self, groups: str, deadline: float, options: argparse.Namespace, rows: Rows):
        self.groups, self.deadline, self.options, self.rows = groups, deadline, options, rows
        self.restarts, self.last, self.buffer = 0, {"number": -1}, b""
        self.launch()

    def launch(self) -> None:
        command = [sys.executable, __file__, "--work", self.groups, "--device", self.options.device]
        command += ["--deadline", repr(self.deadline), "--start", str(self.last["number"] + 1), "--output", "."]
        environment = {**os.environ, KERNELS_VARIABLE: self.options.kernels}
        if self.options.dry_run:
            command.append("--dry-run")
            environment |= {"TRITON_INTERPRET": "1"} if self.options.device == "cpu" else {}
        self.log = (self.rows.folder / f"{self.groups.replace(':', '').replace(',', '+')[:60]}.log").open("ab")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, env=environment)
        os.set_blocking(self.process.stdout.fileno(), False)

    def poll(self) -> bool:
        """Take what it wrote; True when the group is done."""
        ended = self.process.poll() is not None  # before the last read, so that nothing is left behind
        self.read()
        late = time.monotonic() > self.deadline + GRACE
        if not ended and not late:
            return False
        if not ended:
            self.process.kill()
        status = self.process.wait()
        self.read()
        self.log.close()
        self.process.stdout.close()
        if status == 0:
            return True
        if status != BROKEN:  # it could not write its error itself
            reason = "ended because its time was over" if late else f"its process ended with status {status}"
            self.rows.add({"kind": "error", "group": self.groups, "task": self.last.get("task"), "error": reason})
        self.restarts += 1
        if late or self.restarts > MAX_RESTARTS or (self.last["number"] < 0 and self.restarts > 1):
            return True
        self.launch()
        return False

    def read(self) -> None:
        while chunk := self.process.stdout.read():
            self.buffer += chunk
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # something that a library printed
            if row["kind"] == "started":
                self.last = row
            else:
                self.rows.add(row)


class Rows:
    """The rows as they come, in memory and in the file."""

    def __init__(self, folder: Path, start: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.start, self.all = folder, start, []
        self.file = (folder / ROWS).open("w", encoding="utf-8")

    def add(self, row: dict) -> None:
        row = {**row, "at": round(time.monotonic() - self.start, 1)}
        self.all.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if row["kind"] in ("done", "error") or row.get("error"):
            said = row.get("error") or f"{row['seconds']} s"
            print(f"[{row['at']:6.1f} s] {row.get('task') or row['kind']}: {said}", flush=True)


def run_groups(groups: dict[str, float], options: argparse.Namespace, rows: Rows, side_by_side: int) -> None:
    """Every group in a process of its own, ``side_by_side`` at a time; the value is the group's share of the time."""
    waiting, running = list(groups), []
    while waiting or running:
        while waiting and len(running) < side_by_side:
            group = waiting.pop(0)
            running.append(Worker(group, rows.start + groups[group] * options.minutes * 60, options, rows))
        running = [worker for worker in running if not worker.poll()]
        time.sleep(0.02)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for rows and tables")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget (default 8)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; on the CPU in Triton's interpreter")
    parser.add_argument("--group", action="append", choices=[*CHECKS, *SPEED], help="default: all of them")
    parser.add_argument("--install", action="store_true", help="use the measured dispatch table from now on")
    parser.add_argument("--side-by-side", type=int, default=SIDE_BY_SIDE, help="processes that check at the same time")
    for name, kind in (("--work", str), ("--deadline", float), ("--start", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.kernels = "all"  # of the workers: SPARSE_RT_GPU_KERNELS
    return options


def finish(rows: list[dict], options: argparse.Namespace) -> None:
    """The dispatch table and the report, into the output folder."""
    file = gpu_suite_table.write(rows, options.output)
    table = json.loads(file.read_text(encoding="utf-8"))
    text = gpu_suite_report.report(rows) + "\n" + gpu_suite_table.described(table)
    (options.output / REPORT).write_text(text, encoding="utf-8")
    print(text)
    if options.install and not options.dry_run:
        file = gpu_suite_table.write(rows, gpu_suite_table.FOLDER)
        print(f"Installed {file}; commit it for everybody.")
    else:
        print(f"To use what was measured: cp {file} {gpu_suite_table.FOLDER}/, or {KERNELS_VARIABLE}={file}")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.work:
        return work(options)
    rows = Rows(options.output, time.monotonic())
    wanted = options.group or [*CHECKS, *SPEED]
    if options.dry_run:  # one process: importing torch takes longer than the tiny tasks
        groups = ",".join(["environment", *wanted])
        run_groups({groups: 1.0}, options, rows, 1)
    else:
        run_groups({"environment": 0.1}, options, rows, 1)
        run_groups(
            {name: share for name, share in CHECKS.items() if name in wanted}, options, rows, options.side_by_side
        )
        for name, share in SPEED.items():
            if name in wanted:
                # The model runs as it will for users: with the table of what has been timed so far.
                options.kernels = str(gpu_suite_table.write(rows.all, options.output)) if name == GENERATE else "all"
                run_groups({name: share}, options, rows, 1)
    rows.file.close()
    finish(rows.all, options)
    return int(any(row.get("error") for row in rows.all))


if __name__ == "__main__":
    raise SystemExit(main())
