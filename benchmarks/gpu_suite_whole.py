"""Checks of gpu_suite.py that look beyond one kernel: CUDA graphs, torch.compile, waiting for the device, operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from gpu_common import Cell, Context, Row, Task, Wrong, check_error, product64, random_mask, rms
from gpu_timing import warm_up
from torch import Tensor, nn

from sparse_rt.formats import get_format
from sparse_rt.kernels import ops, packed
from sparse_rt.nn import SparseLinear, pack_weights

CELLS = (Cell("2:4", 0.5), Cell("unstructured", 0.75))
SIZE, LAYERS = 512, 3


class Block(nn.Module):
    """A few layers with something between them."""

    def __init__(self, size: int, device: torch.device):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(size, size, bias=i == 0, device=device, dtype=torch.bfloat16) for i in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


def sparse_block(context: Context, cell: Cell) -> tuple[Block, Block]:
    """A block of sparse layers, and a dense one with the same weights."""
    size = 64 if context.dry else SIZE
    sparse, dense = Block(size, context.device), Block(size, context.device)
    for index, layer in enumerate(sparse.layers):
        mask = random_mask(cell, size, size, context.device)
        sparse.layers[index] = SparseLinear.from_dense(layer, cell.pattern, mask)
        dense.layers[index] = sparse.layers[index].to_dense()
    return sparse.eval(), dense.eval()


def tasks(context: Context) -> list[Task]:
    parts: list[Callable] = [check_model, check_operators]
    if context.device.type == "cuda":
        parts = [check_model, check_graph, check_no_waiting, check_compile, check_operators]
    return [
        Task(f"{part.__name__} {cell}", partial(run, part=part, cell=cell))
        for part in parts
        for cell in (CELLS[:1] if context.dry else CELLS)
    ]


def run(context: Context, *, part: Callable, cell: Cell) -> None:
    name = part.__name__.removeprefix("check_").replace("_", " ")
    context.attempt({"kind": "check", **cell.fields, "check": f"whole: {name}"}, lambda: part(context, cell))


def near(found: Tensor, wanted: Tensor, allowed: float = 1e-2) -> Row:
    """Both are bfloat16 products of several layers."""
    error = rms(found, wanted)
    if not error <= allowed:
        raise Wrong(f"relative RMS difference {error:.2e}, allowed {allowed:.0e}")
    return {"rms": {"sparse": error}}


def inputs(context: Context, tokens: int) -> Tensor:
    return torch.randn(tokens, 64 if context.dry else SIZE, device=context.device).to(torch.bfloat16)


def check_model(context: Context, cell: Cell) -> Row:
    """Layers pack themselves in inference, and come back for training."""
    sparse, dense = sparse_block(context, cell)
    x = inputs(context, 3)
    with torch.no_grad():
        found = near(sparse(x), dense(x))
        packs = sum(layer.is_packed for layer in sparse.layers)
        found = {**found, "packed_layers": packs}
        near(sparse(x), dense(x))
    sparse.train()
    given, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    near(*(torch.autograd.grad(m(t).float().square().sum(), t)[0] for m, t in ((sparse, given), (dense, wanted))))
    return found


def check_graph(context: Context, cell: Cell) -> Row:
    """A captured product follows its input, for few tokens and many, packed and canonical."""
    device, (m, n) = context.device, (SIZE, SIZE)
    mask = random_mask(cell, m, n, device)
    weight = torch.where(mask, torch.randn(m, n, device=device), 0.0).to(torch.bfloat16)
    values, metadata = get_format(cell.pattern).compress(weight, mask)
    made = packed.pack(values, metadata, cell.pattern, m, n)
    worst = 0.0
    for tokens in (1, 8, 64, 300):
        x = inputs(context, tokens)
        for call in (
            partial(packed.packed_linear, x, made, None, m, n),
            partial(ops.linear, x, values, metadata, None, cell.pattern, m, n),
        ):
            with torch.no_grad():
                warm_up([call])
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = call()
                x.copy_(inputs(context, tokens))
                y.fill_(float("nan"))
                graph.replay()
                wanted = product64(x, weight)
                error = rms(y, wanted)
                check_error(error, rms(F.linear(x, weight), wanted), torch.bfloat16)
                worst = max(worst, error)
    return {"rms": {"sparse": worst}}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Anything that waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_no_waiting(context: Context, cell: Cell) -> Row:
    """Neither forward nor backward waits for the device, after the first call of a shape."""
    sparse, _ = sparse_block(context, cell)
    for tokens in (1, 300):
        x = inputs(context, tokens)
        sparse.eval()
        with torch.no_grad():
            sparse(x)
            with no_waiting():
                sparse(x)
        sparse.train()
        for layer in sparse.layers:
            layer.weight_values.requires_grad_()
        given = x.clone().requires_grad_()
        sparse(given).float().square().sum().backward()
        with no_waiting():
            sparse(given).float().square().sum().backward()
        for layer in sparse.layers:
            layer.weight_values.requires_grad_(False)
    return {}


def check_compile(context: Context, cell: Cell) -> Row:
    """torch.compile takes the whole model in one graph, with CUDA graphs."""
    sparse, dense = sparse_block(context, cell)
    packs = pack_weights(sparse)
    compiled = torch.compile(sparse, fullgraph=True, mode="reduce-overhead")
    x = inputs(context, 2)
    with torch.no_grad():
        for _ in range(4):  # the third call is a replay
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x).clone()
        return {**near(y, dense(x)), "packed_layers": packs}


def check_operators(context: Context, cell: Cell) -> Row:
    """torch's own test of schemas, shape rules and gradients."""
    device, (m, n), shape = context.device, (48, 64), (cell.pattern, 48, 64)
    weight = torch.randn(m, n, device=device)
    values, metadata = get_format(cell.pattern).compress(weight, random_mask(cell, m, n, device))
    x, dy = (torch.randn(5, size, device=device, requires_grad=True) for size in (n, m))
    values.requires_grad_()
    library = torch.ops.sparse_rt
    for operator, arguments in (
        (library.linear.default, (x, values, metadata, None, *shape)),
        (library.linear_t.default, (dy, values, metadata, *shape)),
        (library.values_grad.default, (dy, x, metadata, *shape, values.detach())),
        (library.decompress.default, (values, metadata, *shape)),
        (library.gather.default, (weight, metadata, *shape, values.detach())),
    ):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=tests)
    return {}
