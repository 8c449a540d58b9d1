"""Times launch options of GPU kernels against each other and cuBLAS, to choose defaults and configs/<gpu>.json by.

    python benchmarks/gpu_tune.py --output results/gpu_tune.jsonl                 # every kernel, about one minute
    python benchmarks/gpu_tune.py --output results/gpu_tune.jsonl --kernel mma_sp

Options are compiled first, several processes side by side, then take turns in one process (gpu_timing.py), on copies of
the weight that no cache holds. A result that differs from the default options' is an error row. ``us`` is the median of
a call; the table lists the three fastest of every product beside the default and cuBLAS.
"""

from __future__ import annotations

import checkout  # isort: skip  # noqa: F401

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from gpu_common import SHAPES, Cell, copies_for, random_weight, rms, short
from gpu_suite_speed import Sparse
from gpu_timing import take_turns
from torch import Tensor

from sparse_rt.benchmarking.machine import machine
from sparse_rt.kernels.triton import configs, d4, mma_sp, packed

LAYERS = SHAPES["Llama-3-8B"]
SPARSE_CELLS = (Cell("unstructured", 0.5), Cell("unstructured", 0.75), Cell("unstructured", 0.9))
COMPILERS = 12
SECONDS = 0.12  # a product
FASTEST = 3
Options = dict


def grid(**axes: tuple) -> list[Options]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


# Kernel -> what is tried, for numbers of tokens.
TRIED: dict[str, dict[int, list[Options]]] = {
    "d4": {tokens: grid(num_warps=(1, 2, 4, 8, 16)) for tokens in (1, 2, 4, 8)},
    "d4_expand": {0: grid(EACH=(4, 8, 16, 32), num_warps=(4, 8, 16))},
    "mma_sp": {tokens: grid(ROW_TILES=(1, 2), num_warps=(2, 4, 8)) for tokens in (1, 8, 16)},
}


class Product:
    """One product of one kernel: its calls under given options, and the dense call in its place."""

    def __init__(self, kernel: str, tokens: int, layer: str, cell: Cell, device: torch.device):
        self.kernel, self.tokens, self.device = kernel, tokens, device
        self.m, self.n = LAYERS[layer]
        self.fields = {"kernel": kernel, "tokens": tokens, "layer": layer, "m": self.m, "n": self.n, **cell.fields}
        weight = random_weight(self.m, self.n, torch.bfloat16, device)
        self.copies, _ = Sparse(weight, cell, False).layout_copies(kernel.partition("_expand")[0])
        self.x = torch.randn(max(1, tokens), self.n, device=device).to(torch.bfloat16)
        self.dense = [weight, *(weight.clone() for _ in range(copies_for(weight.nbytes, False) - 1))]

    def spoil(self) -> None:
        """NaN where the next result goes, as far as that is known."""
        if self.kernel == "d4_expand":
            self.run(self.copies[0]).fill_(float("nan"))

    def calls(self, options: Options | None) -> list[Callable[[], Tensor]]:
        return [partial(self.call, copy, options) for copy in self.copies]

    def dense_calls(self) -> list[Callable[[], Tensor]]:
        if self.kernel == "d4_expand":  # writing as many bytes is what it could be at best
            return [copy.zero_ for copy in self.dense]
        return [partial(F.linear, self.x, copy) for copy in self.dense]

    def call(self, copy: Tensor, options: Options | None) -> Tensor:
        if options is None:
            return self.run(copy)
        with configs.tried(self.kernel, options):
            return self.run(copy)

    def run(self, copy: Tensor) -> Tensor:
        if self.kernel == "mma_sp":
            return mma_sp.linear(self.x, *packed._fragments(copy, self.m, self.n), None, self.m, self.n)
        if self.kernel == "d4_expand":
            return packed._expand(copy, "d4", self.m, self.n, self.x.dtype)
        sections = packed.d4_layout.sections(packed._body(copy, "d4"), self.m, self.n, self.x.dtype)
        return d4.linear(self.x, sections, None, self.m, self.n)


def products(kernels: list[str], device: torch.device) -> Iterator[Product]:
    for kernel in kernels:
        cells = (Cell("2:4", 0.5),) if kernel == "mma_sp" else SPARSE_CELLS
        for layer, cell, tokens in itertools.product(LAYERS, cells, TRIED[kernel]):
            yield Product(kernel, tokens, layer, cell, device)


def compile_part(part: int, kernels: list[str], device: torch.device) -> None:
    """Compile every ``COMPILERS``-th set of options by using it once."""
    number = 0
    for kernel in kernels:
        cell = Cell("2:4", 0.5) if kernel == "mma_sp" else SPARSE_CELLS[1]
        for tokens, tried in TRIED[kernel].items():
            for layer in ("k/v", "down"):
                product = None
                for options in tried:
                    number += 1
                    if number % COMPILERS != part:
                        continue
                    product = product or Product(kernel, tokens, layer, cell, device)
                    try:
                        product.calls(options)[0]()
                    except Exception as error:
                        print(short(error), file=sys.stderr)


@torch.no_grad()
def measure(product: Product) -> list[dict]:
    """A row for every set of options."""
    wanted = product.calls(None)[0]().clone()
    columns = {"dense": product.dense_calls(), "default": product.calls(None)}
    rows, failed = {}, []
    for number, options in enumerate(TRIED[product.kernel][product.tokens]):
        row = {**product.fields, "options": options}
        try:
            product.spoil()
            error = rms(product.calls(options)[0](), wanted)
            if not error < 5e-3:
                raise ValueError(f"differs from the default's result by {error:.1e}")
            columns[number], rows[number] = product.calls(options), row
        except Exception as error:
            failed.append({**row, "error": short(error)})
    times, _ = take_turns(columns, product.device, seconds=SECONDS, min_turns=5, max_turns=12)
    medians = {name: round(statistics.median(found) * 1e6, 3) for name, found in times.items()}
    known = {"dense_us": medians["dense"], "default_us": medians["default"]}
    return [{**row, "us": medians[number], **known} for number, row in rows.items()] + failed


def table(rows: list[dict]) -> None:
    """The fastest options of every product, to the terminal."""
    keys = ("kernel", "tokens", "layer", "pattern", "sparsity")
    for key, group in itertools.groupby(rows, lambda row: [row[name] for name in keys]):
        good = sorted((row for row in group if "us" in row), key=lambda row: row["us"])
        best = "; ".join(f"{row['us']:.1f} {list(row['options'].values())}" for row in good[:FASTEST])
        if good:
            print(*key, f"dense {good[0]['dense_us']:.1f} default {good[0]['default_us']:.1f} |", best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="file for the rows")
    parser.add_argument("--kernel", action="append", choices=list(TRIED), help="default: all")
    parser.add_argument("--minutes", type=float, default=3.0, help="no product is begun after them (default 3)")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    kernels, device, start = options.kernel or list(TRIED), torch.device("cuda"), time.monotonic()
    if options.part is not None:
        return compile_part(options.part, kernels, device)
    command = [sys.executable, __file__, *sys.argv[1:], "--part"]
    parts = [subprocess.Popen([*command, str(part)]) for part in range(COMPILERS)]
    if any(part.wait() for part in parts):
        print("a process that compiled failed; its options are compiled when they are timed", file=sys.stderr)
    print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    rows = []
    with options.output.open("w", encoding="utf-8") as file:
        about = {"kind": "environment", **machine(device), "triton": triton.__version__, "date": str(date.today())}
        file.write(json.dumps(about) + "\n")
        for product in products(kernels, device):
            if time.monotonic() - start > options.minutes * 60:
                print("the time is over: not all products were measured")
                break
            rows += (found := measure(product))
            file.writelines(json.dumps(row) + "\n" for row in found)
            file.flush()
    table(rows)
    return None


if __name__ == "__main__":
    main()
