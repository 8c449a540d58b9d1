"""What a transposable mask is worth for dX = dY W on a CPU: the sparse product with W^T, compressed, against dense.

    cd benchmarks
    python transposed_product.py --threads 1 --threads 2

A JSON row per pattern, number of tokens and threads, with the times of

    dense         dY W with the dense weight (torch)
    expanded      the backward pass of any other mask: ``linear_t`` expands values and metadata, then multiplies
    transposed    the packed product with W^T in the derived layout, which a transposable mask allows: what the backward
                  pass of a frozen weight does (kernels/transposed.py)
    packing       making that layout of W^T's values and metadata, which whoever trains the values pays in every step

and the ratios dense / transposed and expanded / transposed (timing.py). Nothing is timed that does not agree with the
product in float32 to the precision of bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import click
import torch
from timing import ratio, spread, take_turns
from torch import Tensor

from sparse_rt.benchmarking.machine import commit, cpu_name
from sparse_rt.formats import get_format
from sparse_rt.kernels import ops, packed
from sparse_rt.pruning.transposable import TransposableFormat

TOLERANCE = 0.005  # relative, in the Frobenius norm: results rounded to bfloat16 are off by 0.0017


def columns(m: int, n: int, pattern: str, tokens: int) -> dict[str, Callable[[int], Tensor]]:
    """The four things to time, for a random weight (m, n); ``ClickException`` where one is wrong or has no kernel."""
    fmt = get_format(pattern)
    weight = torch.randn(m, n)
    mask = TransposableFormat(fmt).mask_from_scores(weight.abs())
    weight = torch.where(mask, weight, 0).to(torch.bfloat16)
    values, metadata = fmt.compress(weight, mask)
    transposed = fmt.compress(weight.T.contiguous(), mask.T.contiguous())
    reason = packed.refusal(pattern, n, m, weight.dtype, "cpu", 0.5)
    if reason is not None:
        raise click.ClickException(f"no packed product of {pattern} here: {reason}")
    layout = packed.pack(*transposed, pattern, n, m)
    dy = torch.randn(tokens, m).to(weight.dtype)
    found = {
        "dense": lambda turn: dy @ weight,
        "expanded": lambda turn: ops.linear_t(dy, values, metadata, pattern, m, n),
        "transposed": lambda turn: packed.packed_linear(dy, layout, None, n, m),
    }
    exact = dy.float() @ weight.float()
    for name, product in found.items():
        if float((product(0).float() - exact).norm()) > TOLERANCE * float(exact.norm()):
            raise click.ClickException(f"{name} gives another product than float32; nothing was timed")
    return found | {"packing": lambda turn: packed.pack(*transposed, pattern, n, m)}


def row(m: int, n: int, pattern: str, tokens: int, threads: int, seconds: float) -> dict:
    torch.set_num_threads(threads)
    with torch.no_grad():
        timed = columns(m, n, pattern, tokens)
        samples = take_turns(timed, seconds=seconds, min_turns=5, max_turns=200, one_thread=threads == 1)
    clock = samples.clock(*timed)
    times = samples.cpu if clock == "cpu" else samples.wall
    return {
        "shape": [m, n],
        "pattern": pattern,
        "tokens": tokens,
        "threads": threads,
        "ms": {name: spread(times[name], 1000) for name in timed},
        "dense/transposed": ratio(times["dense"], times["transposed"]),
        "expanded/transposed": ratio(times["expanded"], times["transposed"]),
        "turns": samples.turns,
        "clock": clock,
        "busy_cores": samples.busy_cores,
        "cpu": cpu_name(),
        "commit": commit(),
    }


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--shape", "shapes", nargs=2, type=int, multiple=True, default=[(2048, 2048), (8192, 2048)])
@click.option("--pattern", "patterns", multiple=True, default=("2:4", "4:8"), show_default=True)
@click.option("--tokens", multiple=True, type=int, default=(16, 128, 512), show_default=True)
@click.option("--threads", multiple=True, type=int, default=(1,), show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="for each row")
def main(shapes, patterns, tokens, threads, seconds):
    torch.manual_seed(0)
    for count in threads:
        for m, n in shapes:
            for pattern in patterns:
                for number in tokens:
                    click.echo(json.dumps(row(m, n, pattern, number, count, seconds)))


if __name__ == "__main__":
    main()
