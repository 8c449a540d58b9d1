"""Checks of the gradient kernels of gpu_suite.py: what is kept of the tiles of dY^T X, against float64."""

from __future__ import annotations

from functools import partial

import torch
from gpu_common import ERROR_FLOOR, Cell, Context, Row, Task, Wrong, random_mask, rms
from torch import Tensor

from sparse_rt.formats import get_format

# Sums of products of bfloat16 in float32: what is left is their order.
MAX_ERROR = 2e-5
SHAPES, TOKENS = ((512, 1024), (48, 60), (96, 520)), (1, 17, 300)
CELLS = (Cell("2:4", 0.5), Cell("unstructured", 0.5), Cell("unstructured", 0.9), Cell("4:8", 0.5))
GROUPS, RANK, SCALE = 16, 8, 0.5


class Problem:
    """One weight, its inputs, and G = dY^T X in float64."""

    def __init__(self, cell: Cell, m: int, n: int, tokens: int, device: torch.device):
        self.m, self.n, self.tokens = m, n, tokens
        self.mask = random_mask(cell, m, n, device)
        self.dense = torch.where(self.mask, torch.randn(m, n, device=device), 0.0).to(torch.bfloat16)
        self.values, self.metadata = get_format(cell.pattern).compress(self.dense, self.mask)
        self.shape = cell.pattern, m, n
        self.x, self.dy = (torch.randn(tokens, size, device=device).to(torch.bfloat16) for size in (n, m))
        self.g = self.dy.double().t() @ self.x.double()

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.x.device)


def tasks(context: Context) -> list[Task]:
    found = []
    for m, n in SHAPES[1:2] if context.dry else SHAPES:
        for cell in CELLS[:1] if context.dry else CELLS:
            if get_format(cell.pattern).refuse_shape(m, n) is None:
                tokens = TOKENS[1:2] if context.dry else TOKENS
                run = partial(check, cell=cell, m=m, n=n, tokens_list=tokens)
                found.append(Task(f"gradients {m}x{n} {cell.pattern} {cell.sparsity:g}", run))
    return found


def check(context: Context, *, cell: Cell, m: int, n: int, tokens_list: tuple[int, ...]) -> None:
    for tokens in tokens_list:
        problem = Problem(cell, m, n, tokens, context.device)
        for part in (factors, apply_factors, rank_products, positions, growth, columns):
            fields = {"kind": "check", **cell.fields, "m": m, "n": n, "tokens": tokens, "check": part.__name__}
            context.attempt(fields, partial(part, problem))


def close(pairs: list[tuple[Tensor, Tensor]], allowed: float = MAX_ERROR) -> Row:
    error = max(rms(found, wanted) for found, wanted in pairs)
    if not error <= allowed:
        raise Wrong(f"relative RMS error {error:.2e} to float64, allowed {allowed:.2e}")
    return {"rms": {"sparse": error}}


def _factors(p: Problem) -> tuple[Tensor, Tensor]:
    return p.random(GROUPS if p.m % GROUPS == 0 else 1, p.n) * 0.3, p.random(p.m) * 0.3


def factors(p: Problem) -> Row:
    from sparse_rt.kernels.triton import factors as kernels

    a, b = _factors(p)
    da, db = kernels.factors_grad(p.dy, p.x, p.values, p.metadata, *p.shape, a, b, SCALE)
    product = (p.g * p.dense.double() * SCALE).view(a.shape[0], -1, p.n)
    wanted_a = (product * b.double().view(a.shape[0], -1, 1)).sum(1)
    return close([(da, wanted_a), (db, (product * a.double()[:, None]).sum(2).flatten())])


def apply_factors(p: Problem) -> Row:
    from sparse_rt.kernels.triton import factors as kernels

    a, b = _factors(p)
    out = torch.full_like(p.values, float("nan"), dtype=torch.float32)
    kernels.apply_factors(out, p.values, p.metadata, *p.shape, a, b, SCALE)
    rows = a.double().repeat_interleave(p.m // a.shape[0], 0)
    wanted = p.dense.double() * (1 + SCALE * b.double()[:, None] * rows)
    return close([(out, wanted[p.mask].view(out.shape))])


def rank_products(p: Problem) -> Row:
    from sparse_rt.kernels.triton import gradient_epilogues as kernels

    # Factors that bfloat16 holds: whether the kernel rounds them is not what is asked here.
    a, b = (t.to(torch.bfloat16).float() for t in (p.random(RANK, p.n), p.random(p.m, RANK)))
    da, db = kernels.rank_products(p.dy, p.x, p.metadata, *p.shape, a, b, SCALE)
    masked = p.g * p.mask * SCALE
    return close([(da, b.double().t() @ masked), (db, masked @ a.double().t())])


def positions(p: Problem) -> Row:
    from sparse_rt.kernels.triton import gradient_epilogues as kernels

    rows, cols = (torch.rand(p.m, p.n, device=p.x.device) < 0.02).nonzero(as_tuple=True)
    index = kernels.positions_index(rows, cols, p.m, p.n)
    found = kernels.positions_grad(p.dy, p.x, index, p.m, p.n)
    wanted = p.g[rows, cols]
    start = p.random(wanted.numel())
    added = kernels.positions_grad(p.dy, p.x, index, p.m, p.n, start.clone())
    return close([(found, wanted), (added, wanted + start.double())])


def growth(p: Problem) -> Row:
    from sparse_rt.kernels.triton import growth as kernels

    count = p.m * p.n // 100 + 1
    found = kernels.largest_gradients(p.dy, p.x, p.metadata, *p.shape, count)
    if bool(p.mask[found.rows.long(), found.columns.long()].any()):
        raise Wrong("kept positions were chosen")
    magnitudes = p.g.abs().masked_fill(p.mask, -1).flatten().topk(count).values
    magnitudes = magnitudes[magnitudes > 0]
    # Neighbours in rank may change places where they differ by less than the rounding of float32 sums.
    chosen = p.g[found.rows.long(), found.columns.long()]
    pairs = [(chosen.abs().sort(descending=True).values, magnitudes), (found.gradient, chosen)]
    return close(pairs)


def columns(p: Problem) -> Row:
    from sparse_rt.kernels.triton import columns as kernels

    scale = p.random(p.n)
    out = kernels.scale_columns(p.x, scale)
    dh, ds = kernels.scale_columns_grad(p.x, p.x, scale)
    scaled = p.x.double() * scale.double()
    close([(out, scaled), (dh, scaled)], ERROR_FLOOR[torch.bfloat16])
    return close([(ds, (p.x.double() ** 2).sum(0))])
