"""GB/s of dense weight that the native kernels write (decompress) or read (gather), against a plain copy.

    python benchmarks/native_decompress.py --threads 1 --threads 2

One JSON row per case. All cases of a thread count take turns, and the best of the turns counts: on a machine that does
other work as well the best is what repeats. The buffers are larger than the caches of any desktop processor.
"""

from __future__ import annotations

import ctypes
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch

from sparse_rt.formats import get_format
from sparse_rt.kernels import scratch
from sparse_rt.kernels.native import library
from sparse_rt.kernels.native import ops as native

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COPY = "copy", "torch"  # the case and operation that others are compared with


def cases(m: int, n: int, dtype: torch.dtype, sparsities: list[float]) -> dict[str, dict[str, Callable[[], object]]]:
    """Name of the case -> what is timed: decompress into a kept buffer, gather into the values."""
    weight = torch.randn(m, n).to(dtype)
    out = scratch.buffer("benchmark", (m, n), dtype)
    found: dict[str, dict[str, Callable[[], object]]] = {
        "copy": {"torch": lambda: out.copy_(weight)},
        "memcpy": {"libc": lambda: ctypes.memmove(out.data_ptr(), weight.data_ptr(), weight.nbytes)},
    }
    for pattern, sparsity in [("2:4", 0.5), *(("unstructured", sparsity) for sparsity in sparsities)]:
        fmt = get_format(pattern)
        mask = torch.rand(m, n) >= sparsity if pattern == "unstructured" else fmt.mask_from_scores(torch.rand(m, n))
        values, metadata = fmt.compress(weight, mask)
        native.expand_into(out, values, metadata, pattern)
        if not torch.equal(out, torch.where(mask, weight, 0)):
            raise click.ClickException(f"{pattern} at {sparsity} decompresses wrongly; nothing was timed")
        packed = torch.zeros_like(values).view(-1)
        found[f"{pattern} {sparsity:g}"] = {
            "decompress": lambda v=values, d=metadata, p=pattern: native.expand_into(out, v, d, p),
            "gather": lambda t=packed, d=metadata, p=pattern: native.gather_into(t, weight, d, p),
        }
    return found


def best_times(timed: dict[str, dict[str, Callable[[], object]]], repeats: int) -> dict[tuple[str, str], float]:
    """Seconds of the best of ``repeats`` turns, every case once a turn."""
    best: dict[tuple[str, str], float] = {}
    for _ in range(repeats):
        for name, operations in timed.items():
            for operation, run in operations.items():
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
                best[name, operation] = min(best.get((name, operation), seconds), seconds)
    return best


def rows_of(best: dict[tuple[str, str], float], nbytes: int, **common: object) -> Iterator[dict]:
    """A row for each case and operation; ``nbytes`` of the dense weight."""
    for (case, operation), seconds in best.items():
        row = dict(case=case, operation=operation, **common, ms=rounded(seconds * 1e3))
        row |= dict(dense_gb_per_s=rounded(nbytes / seconds / 1e9), ratio_to_copy=rounded(best[COPY] / seconds))
        yield row | dict(processor=processor(), torch=torch.__version__)


def rounded(value: float) -> float:
    """Four significant digits: nothing measured becomes 0, however small the weight."""
    return float(f"{value:.4g}")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@click.command()
@click.option("--shape", nargs=2, type=int, default=(11008, 4096), show_default=True, help="m n of the weight")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--sparsity", "sparsities", multiple=True, type=float, default=(0.5, 0.75, 0.9), show_default=True)
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--isa", multiple=True, type=click.Choice(library.ISAS), help="instruction sets; default: the best one")
@click.option("--repeats", type=int, default=20, show_default=True)
def main(shape, dtype, sparsities, threads, isa, repeats):
    """Time decompress and gather of the native kernels."""
    torch.manual_seed(0)
    loaded = library.load()
    timed = cases(*shape, DTYPES[dtype], list(sparsities))
    nbytes = shape[0] * shape[1] * DTYPES[dtype].itemsize
    for count in threads:
        torch.set_num_threads(count)
        for name in isa or [loaded.isa]:
            loaded.use_isa(name)
            best = best_times(timed, repeats)
            common = dict(shape=list(shape), dtype=dtype, threads=count, isa=name, repeats=repeats)
            for row in rows_of(best, nbytes, **common):
                click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
