"""Dense against sparse, end to end, on a random Llama of a billion parameters: transformers, vLLM, training, memory.

    cd benchmarks
    python cpu_end_to_end.py --workdir DIR --output results/cpu_end_to_end.jsonl                 # everything
    python cpu_end_to_end.py --workdir DIR --model 2:4 --model 0.75 --part vllm-decode           # some of it
    python cpu_end_to_end_report.py results/cpu_end_to_end.jsonl                                 # tables and bars again

Serving in vLLM alone, on which the bars are:

    python cpu_end_to_end.py --workdir DIR --output results/vllm_serving.jsonl --model 0.5 --model 0.7 --model 0.75 \\
        --model 2:4 --part vllm-decode --part vllm-prefill --part vllm-serve

The models are made in the work folder and used again (random_llama.py says which, and why). Every part is one
``sparse-rt bench``, whose command each row names; it takes dense and sparse in turn and forms ratios pair by pair:

    vllm-decode   one engine a side, both kept, bound to the same cores; 32 new tokens after a prompt of 32, the time of
                  the prompt subtracted, batch 1, 4 and 16; start and memory of the engines
    vllm-prefill  prompt of 512 tokens
    vllm-serve    an OpenAI server a side, both kept, asked in turn by vLLM's load generator at a sweep of request rates
    hf-decode     transformers, both models in this process, greedy steps with a key-value cache after 32 tokens
    hf-prefill    prompt of 512 tokens
    train         forward, backward and AdamW on 1 x 256 tokens: SPP on the compressed model, LoRA of as many parameters
                  on the dense one; disk, load and memory in a fresh process a sample, at the peak of training too
    canonical     the memory with SPARSE_RT_PACK=0: compressed layers stay on the tensors of the file; in the other
                  parts they hold the layout that they run from instead

With SPARSE_RT_PREFER=prefill, which chooses another layout at high sparsity, rows are of the model "0.75, prefill";
with --compile, vLLM's default and a minute a start, of "0.75, compiled".

One JSON row per figure, written as soon as its part is done; a part that fails makes an error row, and the exit status
is 1. Dense vLLM multiplies with oneDNN, or with zentorch where that is installed: the rows say which.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import cpu_end_to_end_report as report
import torch
from random_llama import Shape, dense_folder, sparse_folder

from sparse_rt.benchmarking.machine import commit, cpu_name
from sparse_rt.config import BenchOptions
from sparse_rt.errors import SparseRTError, UserError
from sparse_rt.kernels.native.packed import PREFER_VARIABLE, SLOTS_FROM, preference
from sparse_rt.nn import PACK_VARIABLE
from sparse_rt.tools.console import ConsoleProgress
from sparse_rt.workflows.bench import bench

MODELS = {"2:4": ("2:4", 0.5), **{f"{sparsity:g}": ("unstructured", sparsity) for sparsity in (0.5, 0.7, 0.75, 0.9)}}
PARTS = ("vllm-decode", "vllm-prefill", "vllm-serve", "hf-decode", "hf-prefill", "train", "canonical")
# A fresh process a sample is slow, and its figures vary little.
FRESH_REPEATS = 3


def part_options(
    part: str, lengths: dict[str, int], batches: list[int], repeats: int, load: dict[str, Any], compile: bool
) -> dict[str, Any]:
    """The fields of ``BenchOptions`` that a part sets; ``load`` holds those of the sweep."""
    vllm = {"engine": ["vllm"], "compile": compile}
    short = {"prompt_tokens": lengths["prompt"], "new_tokens": lengths["new"], "repeats": repeats}
    long = {"prompt_tokens": lengths["prefill"], "new_tokens": 2, "repeats": repeats}
    fresh = {
        "prompt_tokens": lengths["prompt"],
        "train_tokens": lengths["train"],
        "repeats": min(FRESH_REPEATS, repeats),
    }
    return {
        "vllm-decode": {**vllm, "phase": ["load", "memory", "decode"], "batch": batches, **short},
        "vllm-prefill": {**vllm, "phase": ["prefill"], **long},
        "vllm-serve": {**vllm, "phase": ["serve"], **short, **load},
        "hf-decode": {"phase": ["decode"], **short},
        "hf-prefill": {"phase": ["prefill"], **long},
        "train": {"phase": ["disk", "load", "memory", "train"], **fresh},
        "canonical": {"phase": ["memory"], **fresh},
    }[part]


def run_part(part: str, options: BenchOptions, progress: ConsoleProgress) -> list[dict[str, Any]]:
    """The rows of one ``bench``: each with what decides its meaning."""
    result = bench(options, progress)
    machine = result["machine"]
    shared = {
        "date": result["date"],
        "commit": machine["commit"],
        "processor": machine["cpu"],
        "cores": machine["cores"],
        "threads": machine["threads"],
        "busy": [machine["busy_before"], machine["busy_during"]],
        "packages": machine["packages"],
        "settings": result["settings"],
        "backends": result["backends"],
        "command": command(options),
    }
    return [
        {
            "part": part,
            **row,
            "bench": shared | {"engine_settings": result["engines"].get(row["engine"])},
            "error": None,
        }
        for row in result["rows"]
    ]


def command(options: BenchOptions) -> str:
    """What a user types for the same part, folders by name."""
    settings = [f"OMP_NUM_THREADS={torch.get_num_threads()}"]
    settings += [f"{name}={os.environ[name]}" for name in (PACK_VARIABLE, PREFER_VARIABLE) if name in os.environ]
    words = [*settings, "sparse-rt", "bench", Path(options.model).name]
    for name, value in options.model_dump(exclude_defaults=True, exclude={"model"}).items():
        values = value if isinstance(value, list) else [Path(value).name if name == "baseline" else value]
        option = f"--{name.replace('_', '-')}"
        words += [word for single in values for word in ([option] if single is True else [option, str(single)])]
    return " ".join(words)


def variant(compiled: bool) -> list[str]:
    """How a model runs, as far as it is not the default."""
    default = next(iter(SLOTS_FROM))
    return [preference()] * (preference() != default) + ["compiled"] * compiled


@contextmanager
def unpacked(wanted: bool) -> Iterator[None]:
    """No derived layouts in the processes that are started meanwhile, where ``wanted``."""
    before = os.environ.get(PACK_VARIABLE)
    if wanted:
        os.environ[PACK_VARIABLE] = "0"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ[PACK_VARIABLE]
        elif wanted:
            os.environ[PACK_VARIABLE] = before


def measure(
    parts: Iterable[str], label: str, workdir: Path, shape: Shape, chosen: dict[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each part for one sparse model, part by part."""
    pattern, sparsity = MODELS[label]
    progress = ConsoleProgress(quiet=False)
    sparse = sparse_folder(workdir, shape, pattern, sparsity, progress)
    dense = dense_folder(workdir, shape, progress)
    about = {
        "benchmark": "cpu_end_to_end",
        "model": ", ".join([label, *variant(chosen["compile"])]),
        "pattern": pattern,
        "sparsity": sparsity,
        "parameters": shape.parameters,
        "linear_parameters": shape.linear_parameters,
        "byte_limit": round(shape.byte_limit(pattern, sparsity), 3),
    }
    for part in parts:
        progress.stage(f"== {label}: {part}")
        fields = part_options(part, **chosen)
        try:
            with unpacked(part == "canonical"):
                options = BenchOptions.build(model=str(sparse), baseline=str(dense), **fields)
                rows = run_part(part, options, progress)
        except SparseRTError as error:
            progress.note(f"error: {error}")
            where = {"commit": commit(), "processor": cpu_name(), "threads": torch.get_num_threads()}
            rows = [{"part": part, "error": str(error), "bench": where}]
        yield [about | row for row in rows]


@click.command(help=__doc__.split("\n")[0])
@click.option("--workdir", type=click.Path(path_type=Path), required=True, help="where the models are made and kept")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines; appended to")
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=list(MODELS))
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS)
@click.option("--threads", type=int, help="default: as many as torch uses here")
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 4, 16), show_default=True)
@click.option("--repeats", type=int, default=5, show_default=True, help="pairs of dense and sparse")
@click.option("--prompt-tokens", type=int, default=32, show_default=True, help="before a decode step")
@click.option("--new-tokens", type=int, default=32, show_default=True)
@click.option("--prefill-tokens", type=int, default=512, show_default=True)
@click.option("--train-tokens", type=int, default=256, show_default=True)
@click.option("--request-rate", "rates", multiple=True, type=float, default=(1, 4, float("inf")), show_default=True)
@click.option("--num-prompts", type=int, default=32, show_default=True, help="requests of each sample of vllm-serve")
@click.option("--compile", "compiled", is_flag=True, help="vLLM compiles the models, its default")
@click.option("--make-only", is_flag=True, help="make the models and stop")
@click.option("--layers", type=int, default=Shape.layers, show_default=True)
@click.option("--hidden", type=int, default=Shape.hidden, show_default=True)
@click.option("--intermediate", type=int, default=Shape.intermediate, show_default=True)
@click.option("--heads", type=int, default=Shape.heads, show_default=True)
@click.option("--kv-heads", type=int, default=Shape.kv_heads, show_default=True)
@click.option("--vocabulary", type=int, default=Shape.vocabulary, show_default=True)
def main(workdir, output, models, parts, threads, batches, repeats, rates, num_prompts, compiled, make_only, **sizes):
    lengths = {name: sizes.pop(f"{name}_tokens") for name in ("prompt", "new", "prefill", "train")}
    shape = Shape(**sizes)
    if threads:
        torch.set_num_threads(threads)
    chosen = {"lengths": lengths, "batches": list(batches), "repeats": repeats, "compile": compiled}
    chosen["load"] = {"request_rate": list(rates), "num_prompts": num_prompts}
    rows = []
    for label in models:
        for found in measure(() if make_only else parts, label, workdir, shape, chosen):
            rows += found
            if output:
                with output.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)
    if rows:
        click.echo(report.tables(rows))
    if any(row["error"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
