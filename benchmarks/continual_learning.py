"""Continual learning on the shipped model: three domains one after the other, what they gain and what is forgotten.

    cd benchmarks
    python continual_learning.py --workdir /tmp/continual --tune
    python continual_learning.py --workdir /tmp/continual
    python continual_report.py

The model is pruned with Wanda by `convert` (2:4; 60 % unstructured with ``--bases 60%``); then Python, English prose
and C headers are trained in this order, ``--steps`` steps of 2 sequences of 256 tokens each, and after every task the
perplexity of all three is measured on files of their own (continual_domains.py). Adapters run in float32 on the
compressed weights and are not merged in between.

    spp, masklora, seft (survivors)             one adapter that goes on from task to task
    spp-replay, spp-ewc                         SPP with 5 % of the rows from earlier tasks; with the penalty of EWC
    dcft, dcft-frob, dcft-cos, dcft-taylor      DCFT without and with a penalty toward the map of the task before
    dcft-switch                                 a map for every task, switched when measuring: nothing can be forgotten
    spp-joint                                   SPP on the rows of all tasks mixed: what is possible

Every method that is tuned gets three trials of 24 steps a task on seed 0 and the 2:4 model: three learning rates, or
three strengths of its penalty at the learning rate of the method without it. The best geometric mean of the final
perplexities on validation texts is taken. dcft-switch and spp-joint take the rates of dcft and spp.

Cells that the output holds are skipped, so a stopped run goes on; several processes share the work with ``--part 0/2``
and ``--part 1/2``.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import click
import continual_domains as domains
import continual_methods as methods
import torch

from sparse_rt import assets
from sparse_rt.benchmarking.machine import commit, cpu_name
from sparse_rt.config import ConvertOptions
from sparse_rt.training.continual import perplexity_metrics
from sparse_rt.workflows.convert import convert

BASES = {"2:4": ("2:4", 0.5), "60%": ("unstructured", 0.6)}
SEEDS, TRIAL_STEPS = (0, 1, 2), 24
RESULTS = Path(__file__).resolve().parent / "results" / "continual_learning.jsonl"


def pruned(workdir: Path, base: str) -> Path:
    """The shipped model pruned with Wanda, made once for all processes."""
    pattern, sparsity = BASES[base]
    folder = workdir / base.replace(":", "of").replace("%", "")
    if not folder.exists():
        own = folder.with_name(f"{folder.name}.{os.getpid()}")
        fields = {"pattern": pattern, "sparsity": sparsity, "method": "wanda", "num_samples": 64, "max_seq_len": 256}
        convert(ConvertOptions.build(model=str(assets.model_dir()), output_dir=own, **fields))
        if not folder.exists():
            own.rename(folder)
    return folder


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def chosen(rows: list[dict[str, Any]], name: str) -> float | None:
    """The best trial of a method; None: not all of them were made."""
    method = methods.METHODS[name]
    tried = [row for row in rows if row["kind"] == "tune" and row["method"] == name]
    if {row[method.tuned] for row in tried} < set(method.trials):
        return None
    return min(tried, key=lambda row: row["validation_perplexity"])[method.tuned]


def settings(rows: list[dict[str, Any]], name: str, trial: float | None) -> tuple[float | None, float | None]:
    """(learning rate, strength) of a cell; a missing rate means that other trials come first."""
    method = methods.METHODS[name]
    value = trial if trial is not None else chosen(rows, name) if method.trials else None
    if method.tuned == "learning_rate" and method.trials:
        return value, None
    rate = chosen(rows, method.like)
    return (rate if value is not None or not method.trials else None), value


def cells(tune: bool, names: list[str], seeds: list[int], bases: list[str]) -> list[tuple[str, str, int, float | None]]:
    """(base, method, seed, trial) in the order in which they are run."""
    if not tune:
        return [(base, name, seed, None) for base in bases for seed in seeds for name in names]
    ordered = sorted(names, key=lambda name: methods.METHODS[name].tuned == "strength")
    return [("2:4", name, 0, trial) for name in ordered for trial in methods.METHODS[name].trials]


def key_of(row: dict[str, Any]) -> tuple:
    trial = row[methods.METHODS[row["method"]].tuned] if row["kind"] == "tune" else None
    return row["base"], row["method"], row["seed"], trial


def measure(cell: tuple, rows: list[dict[str, Any]], workdir: Path, steps: int) -> dict[str, Any] | None:
    base, name, seed, trial = cell
    rate, strength = settings(rows, name, trial)
    if rate is None:
        return None
    folder, start = pruned(workdir, base), time.perf_counter()
    room = workdir / f"cell-{os.getpid()}"
    before = methods.before_training(folder, "test") if trial is None else None
    found = methods.run(name, folder, seed, steps, rate, strength, room, before)
    shutil.rmtree(room, ignore_errors=True)
    table = found.pop("perplexities")
    if trial is not None:
        found["validation_perplexity"] = round(float(torch.tensor(table[-1]).log().mean().exp()), 4)
    else:
        found["perplexities"] = table
    if len(table) == len(domains.DOMAINS) + 1:
        found |= {key: round(value, 5) for key, value in vars(perplexity_metrics(table)).items()}
    return {
        "kind": "run" if trial is None else "tune",
        "base": base,
        "method": name,
        "seed": seed,
        "steps": steps,
        "learning_rate": rate,
        "strength": strength,
        **found,
        "seconds": round(time.perf_counter() - start, 1),
        "texts": {domain: domains.digest(domain) for domain in domains.DOMAINS},
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "commit": commit(),
    }


def read_list(text: str | None, known: list, kind: type = str) -> list:
    found = [kind(part) for part in text.split(",")] if text else list(known)
    unknown = [part for part in found if part not in known] if kind is str else []
    if unknown:
        raise click.UsageError(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    return found


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--workdir", type=click.Path(path_type=Path), required=True, help="folder for the pruned models")
@click.option("--tune", is_flag=True, help="make the trials instead of running the cells")
@click.option("--methods", "names", help=f"comma separated; default: all of {', '.join(methods.METHODS)}")
@click.option("--bases", default="2:4", show_default=True, help=f"comma separated; of {', '.join(BASES)}")
@click.option("--seeds", help="comma separated; default: 0,1,2")
@click.option("--steps", default=64, show_default=True, help="optimizer steps a task")
@click.option("--part", default="0/1", help="this process takes every k-th cell: INDEX/COUNT")
def main(output: Path, workdir: Path, tune: bool, names, bases, seeds, steps: int, part: str) -> None:
    torch.set_num_threads(1)
    workdir.mkdir(parents=True, exist_ok=True)
    index, count = map(int, part.split("/"))
    known = methods.available()
    wanted = cells(tune, read_list(names, known), read_list(seeds, SEEDS, int), read_list(bases, list(BASES)))
    domains.CACHE = workdir
    waiting = [cell for number, cell in enumerate(wanted) if number % count == index]
    while waiting:
        cell = waiting.pop(0)
        rows = [row for row in read_rows(output) if row["kind"] == "tune" or row["steps"] == steps]
        if cell in {key_of(row) for row in rows if (row["kind"] == "tune") is tune}:
            continue
        row = measure(cell, rows, workdir, TRIAL_STEPS if tune else steps)
        if row is None:
            if not tune or count == 1:
                raise click.UsageError(f"{cell}: trials are missing, run with --tune first")
            waiting.append(cell)  # another process makes them
            time.sleep(2)
            continue
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {key: row[key] for key in ("validation_perplexity", "acc", "last", "forgetting") if key in row}
        click.echo(f"{cell} rate {row['learning_rate']} {shown} {row['seconds']} s")


if __name__ == "__main__":
    main()
