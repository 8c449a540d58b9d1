"""The checks of gpu_suite.py: every kernel against float64 on the GPU, odd shapes, dtypes, tokens; one row each.

A result may differ from float64 by 1.5 times what torch's dense product of the same dtype differs (gpu_common.py); what
only moves numbers must be equal. Results are written over memory full of NaN, so an element that is not written shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import gpu_suite_whole
import torch
import torch.nn.functional as F
from gpu_common import Cell, Context, Row, Task, Wrong, check_error, poison, product64, random_mask, rms
from gpu_suite_speed import forced
from torch import Tensor

from sparse_rt.benchmarking.machine import machine, machine_line
from sparse_rt.formats import get_format
from sparse_rt.kernels import ops, packed
from sparse_rt.kernels.triton import packed as gpu_packed

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (m, n): one group, odd sizes, a size with whole tiles, more columns than 16 bits count, more rows than a wave.
SHAPES = ((512, 1024), (17, 60), (33, 132), (1, 8), (48, 40000), (4097, 520))
TOKENS = (1, 3, 4, 8, 16, 17, 64, 200)
PACKED_TOKENS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 64, 100)
SPARSITIES = (0.5, 0.9, 0.0, 1.0)
# More elements than 31 bits count.
LARGE = (66000, 32784)
LARGE_BLOCK = 8000


def environment(context: Context) -> list[Task]:
    return [Task("environment", _environment)]


def _environment(context: Context) -> None:
    import triton

    facts = machine(context.device)
    row = {"kind": "environment", **facts, "triton": triton.__version__, "cuda": torch.version.cuda}
    row["machine"] = f"{machine_line(facts)}, Triton {triton.__version__}, CUDA {torch.version.cuda}"
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        row |= {"processors": properties.multi_processor_count, "gpu_bytes": properties.total_memory}
        row["copy_bytes_per_second"] = copy_speed(context.device)
    context.emit(row)


def copy_speed(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 4 GiB: what a decode step can hope for."""
    source = torch.randn(1 << 30, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return round(2 * source.nbytes / min(times))


def tasks(context: Context, group: str) -> list[Task]:
    """The tasks of one group, the most important first."""
    kind, _, pattern = group.partition("-")
    if kind == "gradients":
        from gpu_suite_gradients import tasks as gradients

        return gradients(context)
    if kind == "whole":
        return gpu_suite_whole.tasks(context)
    return [
        Task(f"{group} {name}", part) for name, part in (ops_parts if kind == "ops" else packed_parts)(context, pattern)
    ]


class Weight:
    """A random weight of one cell: canonical tensors and the dense weight."""

    def __init__(self, cell: Cell, m: int, n: int, dtype: torch.dtype, device: torch.device):
        self.cell, self.m, self.n = cell, m, n
        mask = random_mask(cell, m, n, device)
        if cell.pattern == "unstructured" and 0 < cell.sparsity < 1 and m > 2:
            mask[m // 2], mask[m // 3] = False, True  # an empty and a full row
        self.dense = torch.where(mask, torch.randn(m, n, device=device), 0.0).to(dtype)
        self.mask = mask
        self.values, self.metadata = get_format(cell.pattern).compress(self.dense, mask)

    @property
    def shape(self) -> tuple[str, int, int]:
        return self.cell.pattern, self.m, self.n

    @property
    def canonical(self) -> tuple[Tensor, Tensor]:
        return self.values, self.metadata


def cells(pattern: str, dry: bool = False) -> list[Cell]:
    if pattern != "unstructured":
        return [Cell(pattern, 0.5)]
    return [Cell(pattern, sparsity) for sparsity in (SPARSITIES[:1] if dry else SPARSITIES)]


def fitting(pattern: str, shapes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(m, n) for m, n in shapes if get_format(pattern).refuse_shape(m, n) is None]


def product(context: Context, fields: Row, run: Callable[[], Tensor], plain: Callable[[], Tensor], wanted: Tensor):
    """A check row: ``run`` against the float64 ``wanted``, not much worse than the dense ``plain``."""

    def part() -> Row:
        dense = rms(plain(), wanted)
        poison(wanted.device, wanted.numel() * torch.empty(0, dtype=run_dtype).element_size())
        found = run()
        if found.dtype != run_dtype:
            raise Wrong(f"the result is {found.dtype}, expected {run_dtype}")
        error = rms(found, wanted)
        check_error(error, dense, run_dtype)
        return {"rms": {"dense": dense, "sparse": error}}

    run_dtype = fields.pop("result_dtype")
    context.attempt({"kind": "check", **fields, "dtype": str(run_dtype).removeprefix("torch.")}, part)


def equal(context: Context, fields: Row, pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
    """A check row: bit for bit (zeros of either sign are told apart)."""

    def part() -> Row:
        for found, wanted in pairs():
            if found.shape != wanted.shape or found.dtype != wanted.dtype:
                raise Wrong(f"got {found.dtype} {tuple(found.shape)}, expected {wanted.dtype} {tuple(wanted.shape)}")
            if not torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)):
                raise Wrong(f"{int((found != wanted).sum())} of {found.numel()} elements differ")
        return {}

    context.attempt({"kind": "check", **fields}, part)


def ops_parts(context: Context, pattern: str) -> list[tuple[str, Callable[[Context], None]]]:
    """bfloat16 everywhere; float16 and float32 on a few shapes."""
    shapes = fitting(pattern, SHAPES[1:3] if context.dry else SHAPES)
    parts = []
    for dtype, chosen, tokens in (
        (BF16, shapes, TOKENS[1:2] if context.dry else TOKENS),
        (FP32, shapes[:2], (3, 17, 200)),
        (FP16, shapes[:2], (3, 17)),
    ):
        if context.dry and dtype != BF16:
            continue
        for m, n in chosen:
            for cell in cells(pattern, context.dry or dtype != BF16):
                name = f"{m}x{n} {cell.sparsity:g} {str(dtype).removeprefix('torch.')}"
                parts.append((name, partial(check_ops, cell=cell, m=m, n=n, dtype=dtype, tokens_list=tokens)))
    if not context.dry and pattern in ("2:4", "unstructured"):
        parts.append(("large", partial(check_large, pattern=pattern)))
    return parts


def check_ops(
    context: Context, *, cell: Cell, m: int, n: int, dtype: torch.dtype, tokens_list: tuple[int, ...]
) -> None:
    """The five operations by way of the dense weight, as on an unmeasured GPU, and by the tile kernels."""
    device = context.device
    weight = Weight(cell, m, n, dtype, device)
    fields = {**cell.fields, "m": m, "n": n}
    given, dense, shape = weight.canonical, weight.dense, weight.shape
    equal(context, {**fields, "check": "decompress"}, lambda: [(ops.decompress(*given, *shape), dense)])
    noise = torch.randn(m, n, device=device).to(dtype)
    gathered = noise[weight.mask].view(given[0].shape)
    equal(context, {**fields, "check": "gather"}, lambda: [(ops.gather(noise, given[1], *shape, given[0]), gathered)])
    bias = torch.randn(m, device=device).to(dtype)
    for tokens in tokens_list:
        x, dy = (torch.randn(tokens, size, device=device).to(dtype) for size in (n, m))
        b = bias if tokens % 2 else None
        named = {**fields, "tokens": tokens, "result_dtype": dtype}
        y64, dx64 = product64(x, dense, b), product64(dy, dense.t())
        plain, plain_t = partial(F.linear, x, dense, b), lambda dy=dy: dy @ dense
        for name, run in linear_ways(x, given, b, shape, tokens).items():
            product(context, {**named, "check": name}, run, plain, y64)
        for name, run in linear_t_ways(dy, given, shape, context.dry or tokens > 64).items():
            product(context, {**named, "check": name}, run, plain_t, dx64)
        grad64 = product64(dy.t(), x.t())
        for like in {dtype, FP32}:
            values_like, named["result_dtype"] = given[0].to(like), like
            wanted = grad64[weight.mask].view(given[0].shape)
            for name, kernels in (("values_grad kernel", ("values_grad",)), ("values_grad", ())):
                run = forced(kernels, ops.values_grad, dy, x, given[1], *shape, values_like)
                product(context, {**named, "check": name}, run, lambda w=wanted, t=like: w.to(t), wanted)


def linear_ways(x: Tensor, given: tuple[Tensor, Tensor], bias: Tensor | None, shape: tuple, tokens: int) -> dict:
    wide = torch.cat([x, x], 1)[:, : x.shape[1]] if tokens <= 64 else x  # rows of another tensor
    return {
        "linear": forced((), ops.linear, x, *given, bias, *shape),
        "linear kernel": forced(("linear",), ops.linear, wide, *given, bias, *shape),
    }


def linear_t_ways(dy: Tensor, given: tuple[Tensor, Tensor], shape: tuple, once: bool) -> dict:
    ways = {"linear_t kernel": forced(("linear_t",), ops.linear_t, dy, *given, *shape)}
    return ways | ({"linear_t": forced((), ops.linear_t, dy, *given, *shape)} if once else {})


def check_large(context: Context, *, pattern: str) -> None:
    """Offsets beyond 2^31: built and compared a block of rows at a time."""
    device, (m, n) = context.device, LARGE
    cell, fmt, pieces = Cell(pattern, 0.5), get_format(pattern), []
    blocks = [(start, min(start + LARGE_BLOCK, m)) for start in range(0, m, LARGE_BLOCK)]
    for start, stop in blocks:
        mask = random_mask(cell, stop - start, n, device)
        pieces.append((*fmt.compress(torch.randn(stop - start, n, device=device).to(BF16), mask), stop - start))
    values, metadata = fmt.concat_rows(pieces, n)
    shape, fields = (pattern, m, n), {**cell.fields, "m": m, "n": n}
    dense = torch.cat([fmt.decompress(v, meta, rows, n) for v, meta, rows in pieces])
    del pieces

    def blockwise():
        found = ops.decompress(values, metadata, *shape)
        return [(found[start:stop], dense[start:stop]) for start, stop in blocks]

    equal(context, {**fields, "check": "decompress"}, blockwise)
    x, dy = torch.randn(3, n, device=device).to(BF16), torch.randn(3, m, device=device).to(BF16)
    named = {**fields, "tokens": 3, "result_dtype": BF16}
    run, plain = partial(ops.linear, x, values, metadata, None, *shape), partial(F.linear, x, dense)
    product(context, {**named, "check": "linear"}, run, plain, product64(x, dense))
    dx64 = torch.zeros(3, n, dtype=torch.float64, device=device)
    for start, stop in blocks:
        dx64 += dy[:, start:stop].double() @ dense[start:stop].double()
    run = partial(ops.linear_t, dy, values, metadata, *shape)
    product(context, {**named, "check": "linear_t"}, run, lambda: dy @ dense, dx64)
    start, stop = blocks[-1]
    kept = fmt.unpack_mask(metadata[start:stop], stop - start, n)
    grad = (dy[:, start:stop].double().t() @ x.double())[kept]
    run = lambda: ops.values_grad(dy, x, metadata, *shape, values).flatten()[-grad.numel() :]  # noqa: E731
    product(context, {**named, "check": "values_grad"}, run, lambda: grad.to(BF16), grad)


def packed_parts(context: Context, pattern: str) -> list[tuple[str, Callable[[Context], None]]]:
    shapes = fitting(pattern, SHAPES[2:3] if context.dry else SHAPES)
    parts = []
    for dtype in (BF16,) if context.dry else (BF16, FP16, FP32):
        for m, n in shapes if dtype == BF16 else shapes[:2]:
            for cell in cells(pattern, context.dry or dtype != BF16):
                name = f"{m}x{n} {cell.sparsity:g} {str(dtype).removeprefix('torch.')}"
                parts.append((name, partial(check_packed, cell=cell, m=m, n=n, dtype=dtype)))
    if pattern == "2:4" and not context.dry:
        parts.append(("cuSPARSELt", check_cslt))
    return parts


def check_packed(context: Context, *, cell: Cell, m: int, n: int, dtype: torch.dtype) -> None:
    """There and back bit for bit, and the product for few and many tokens."""
    weight = Weight(cell, m, n, dtype, context.device)
    fields = {**cell.fields, "m": m, "n": n, "dtype": str(dtype).removeprefix("torch.")}
    reason = packed.refusal(cell.pattern, m, n, dtype, context.device.type) if not context.dry else None
    if reason is not None:
        must = dtype == BF16 and n >= 256 and not context.dry
        refused = {"kind": "check", **fields, "check": "pack", "refused": reason}
        return context.emit({**refused, "error": f"refused: {reason}"} if must else refused)
    layouts = ["d4"]
    if cell.pattern == "2:4" and dtype in (BF16, FP16) and context.device.type == "cuda":
        layouts.append("mma_sp")
    for layout in layouts:
        check_layout(context, weight, {**fields, "layout": layout})


def check_layout(context: Context, weight: Weight, fields: Row, tokens_list: tuple[int, ...] = PACKED_TOKENS) -> None:
    """One layout: there and back, its kernels up to their limits, the dense weight formed from it for the rest."""
    made: list[Tensor] = []
    m, n, dtype, layout = weight.m, weight.n, weight.values.dtype, fields["layout"]

    def there_and_back():
        made.append(gpu_packed.pack(*weight.canonical, *weight.shape, layout))
        return zip(gpu_packed.unpack(made[0], *weight.shape), weight.canonical, strict=True)

    equal(context, {**fields, "check": "pack and unpack"}, there_and_back)
    if not made:
        return
    bias, on_gpu = torch.randn(m, device=context.device).to(dtype), context.device.type == "cuda"
    linear = packed.packed_linear if on_gpu else gpu_packed.linear  # the operator of the CPU has other layouts
    for tokens in (1, 17) if context.dry else tokens_list:
        x = torch.randn(tokens, n, device=context.device).to(dtype)
        b = bias if tokens % 2 else None
        plain, y64 = partial(F.linear, x, weight.dense, b), product64(x, weight.dense, b)
        for name, kernels in (("packed_linear", tuple(layout.split("+"))), ("packed_linear, dense", ())):
            if kernels or tokens in (1, 17):
                run = forced(kernels, linear, x, made[0], b, m, n)
                named = {**fields, "tokens": tokens, "result_dtype": dtype, "check": name}
                with torch.no_grad():
                    product(context, named, run, plain, y64)
    if not on_gpu:
        return
    x = torch.randn(5, n, device=context.device).to(dtype).requires_grad_()
    dy = torch.randn(5, m, device=context.device).to(dtype)
    named = {**fields, "tokens": 5, "result_dtype": dtype, "check": "packed_linear gradient"}
    run = lambda: torch.autograd.grad(packed.packed_linear(x, made[0], None, m, n), x, dy)[0]  # noqa: E731
    product(context, named, run, lambda: dy @ weight.dense, product64(dy, weight.dense.t()))


def check_cslt(context: Context) -> None:
    """cuSPARSELt through torch, before and after the sweep over its algorithms."""
    from sparse_rt.kernels.triton import cslt

    weight = Weight(Cell("2:4", 0.5), 1024, 512, BF16, context.device)
    fields = {"kind": "check", **weight.cell.fields, "m": weight.m, "n": weight.n}
    reason = cslt.refusal(BF16, weight.m, weight.n)
    if reason is not None:
        return context.emit({**fields, "check": "cuSPARSELt", "refused": reason})
    blob = cslt.compress(*weight.canonical, weight.m, weight.n)
    bias = torch.randn(weight.m, device=context.device).to(BF16)
    for swept in (False, True):
        for tokens in (128, 1000):
            if swept:
                cslt.sweep(blob, weight.m, weight.n, tokens)
            x = torch.randn(tokens, weight.n, device=context.device).to(BF16)
            named = {**fields, "tokens": tokens, "result_dtype": BF16, "check": f"cuSPARSELt{', swept' * swept}"}
            run = partial(cslt.linear, x, blob, bias, weight.m, weight.n)
            plain = partial(F.linear, x, weight.dense, bias)
            product(context, named, run, plain, product64(x, weight.dense, bias))
    for layout in ("cslt", "mma_sp+cslt"):
        named = {**weight.cell.fields, "m": weight.m, "n": weight.n, "layout": layout}
        check_layout(context, weight, named, (1, 16, 512, 2000))
    return None
