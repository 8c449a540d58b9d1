"""GB/s of dense weight that packing into a derived layout and unpacking take, against a copy of the dense weight.

    cd benchmarks
    python pack.py --threads 1 --threads 2

One JSON row per pattern, sparsity and layout. Every call allocates what it returns, as when a model is loaded, so the
page faults of new memory are included; the copy pays them too (on 4 KB pages, which packed weights avoid). Turns and
the best of them as in native_decompress.py. Nothing is timed that does not come back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import click
import torch
from native_decompress import COPY, DTYPES, best_times, rows_of

from sparse_rt.formats import get_format
from sparse_rt.kernels import packed
from sparse_rt.kernels.native import library
from sparse_rt.kernels.native.packed import DTYPES as KINDS
from sparse_rt.kernels.native.packed import LAYOUTS


def layouts(pattern: str, dtype: torch.dtype, wanted: tuple[str, ...]) -> list[str]:
    runs = library.load().handle.srt_packed_runs
    found = [name for name in wanted or LAYOUTS if runs(LAYOUTS.index(name), KINDS.index(dtype))]
    return [name for name in found if name != "pairs" or pattern == "2:4"]


def cases(m: int, n: int, dtype: torch.dtype, sparsities: list[float], wanted: tuple[str, ...]) -> dict:
    """Name of the case -> {"pack": ..., "unpack": ...}, and the copy."""
    weight = torch.randn(m, n).to(dtype)
    found: dict[str, dict[str, Callable[[], object]]] = {COPY[0]: {COPY[1]: weight.clone}}
    for pattern, sparsity in [("2:4", 0.5), *(("unstructured", sparsity) for sparsity in sparsities)]:
        fmt = get_format(pattern)
        mask = torch.rand(m, n) >= sparsity if pattern == "unstructured" else fmt.mask_from_scores(torch.rand(m, n))
        canonical = fmt.compress(weight, mask)
        for layout in layouts(pattern, dtype, wanted):
            made = packed.pack(*canonical, pattern, m, n, layout)
            back = packed.unpack(made, pattern, m, n)
            if not all(torch.equal(one, other) for one, other in zip(canonical, back, strict=True)):
                raise click.ClickException(f"{pattern} {sparsity:g} {layout} does not come back; nothing was timed")
            found[f"{pattern} {sparsity:g} {layout}"] = {
                "pack": lambda c=canonical, p=pattern, t=layout: packed.pack(*c, p, m, n, t),
                "unpack": lambda made=made, p=pattern: packed.unpack(made, p, m, n),
            }
    return found


@click.command()
@click.option("--shape", nargs=2, type=int, default=(11008, 4096), show_default=True, help="m n of the weight")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--sparsity", "sparsities", multiple=True, type=float, default=(0.5, 0.75, 0.9), show_default=True)
@click.option("--layout", "wanted", multiple=True, type=click.Choice(LAYOUTS), help="default: all that run here")
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--isa", multiple=True, type=click.Choice(library.ISAS), help="instruction sets; default: the best one")
@click.option("--repeats", type=int, default=20, show_default=True)
def main(shape, dtype, sparsities, wanted, threads, isa, repeats):
    """Time pack and unpack of the derived layouts."""
    torch.manual_seed(0)
    loaded = library.load()
    nbytes = shape[0] * shape[1] * DTYPES[dtype].itemsize
    for count in threads:
        torch.set_num_threads(count)
        for name in isa or [loaded.isa]:
            loaded.use_isa(name)
            best = best_times(cases(*shape, DTYPES[dtype], list(sparsities), wanted), repeats)
            common = dict(shape=list(shape), dtype=dtype, threads=count, isa=name, repeats=repeats)
            for row in rows_of(best, nbytes, **common):
                click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
