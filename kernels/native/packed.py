"""Backend ``native`` of ``packed_linear``: which layout a weight gets, how it is made, and the product.

The layouts are described in csrc/packed.h. They are made for this processor and live in memory only.
"""

from __future__ import annotations

import os
import struct

import torch
from torch import Tensor

from sparse_rt.errors import BackendError, FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels.backends import Call, register_backend
from sparse_rt.kernels.native import library, pages
from sparse_rt.kernels.native.checks import check_weight
from sparse_rt.kernels.native.ops import can_run

LAYOUTS = ("bitmask", "pairs", "slots")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PANEL = 16

# The sparsity from which a weight is laid out as `slots` instead of `bitmask`, by what its user prefers. `slots`
# multiplies as often as there are kept weights, but reads 3 bytes for each and padding: at 75 % 0.41 of dense,
# `bitmask` 0.31.
# Time of `slots` over that of `bitmask`, by hand, on two cores that share 33 GB/s (Zen 4, 2048 x 8192 bf16):
#              1 token   4    16    64         where memory is not the limit (two cores, 60 GB/s, 16384 x 2048):
#       70 %    1.09   0.96  0.80  0.71               0.90  0.84  0.79  0.73
#       75 %    1.15   0.91  0.73  0.63               0.77  0.76  0.70  0.64
#       80 %    1.02   0.80  0.63  0.53               0.67  0.70  0.61  0.55
# A server has more cores and less bandwidth for each, and what a model takes counts: so few tokens decide by default.
SLOTS_FROM = {"decode": 0.8, "prefill": 0.68, "memory": float("inf")}
PREFER_VARIABLE = "SPARSE_RT_PREFER"
_HEADER = struct.Struct("8sii4q40xq")  # magic to bytes, and nibbles, of srt_packed in csrc/packed.h


def choose_layout(pattern: str, dtype: torch.dtype, sparsity: float) -> tuple[str, str]:
    """The layout for a weight on this processor, and the reason in words."""
    handle = library.load().handle
    isa = library.load().isa

    def runs(layout: str) -> bool:
        return bool(handle.srt_packed_runs(LAYOUTS.index(layout), DTYPES.index(dtype)))

    if pattern == "2:4" and runs("pairs"):
        return "pairs", "2:4 on this processor needs no expansion: half the products at any number of tokens"
    if not runs("slots"):
        return "bitmask", f"the only layout that {isa} has for {str(dtype).removeprefix('torch.')}"
    wanted = preference()
    if sparsity >= SLOTS_FROM[wanted]:
        limit = f"sparsity {sparsity:.0%} >= {SLOTS_FROM[wanted]:.0%}"
        return "slots", f"{limit} ({PREFER_VARIABLE}={wanted}): as many products as kept weights"
    return "bitmask", f"{PREFER_VARIABLE}={wanted}: smallest in memory, expanded in registers"


def preference() -> str:
    """What ``SPARSE_RT_PREFER`` says, a key of ``SLOTS_FROM``; ``UserError`` for a word that it does not know."""
    default = next(iter(SLOTS_FROM))
    wanted = os.environ.get(PREFER_VARIABLE) or default
    if wanted not in SLOTS_FROM:
        others = ", ".join(name for name in SLOTS_FROM if name != default)
        raise UserError(f"{PREFER_VARIABLE}={wanted}: allowed are {default} (default), {others}")
    return wanted


def pack(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int, layout: str | None = None) -> Tensor:
    """uint8 [bytes]: the derived layout of canonical ``values`` and ``metadata``; ``layout`` overrides the choice.

    Raises ``FormatError`` where values and metadata contradict each other.
    """
    fmt = get_format(pattern)
    fmt.check_header("weight", values.shape, metadata.shape, m, n)
    check_weight(metadata, pattern, m, n, values)
    values, metadata = values.detach().contiguous(), metadata.detach().contiguous()
    nibbles = int(fmt.metadata_name == "weight_meta")
    layout = layout or choose_layout(pattern, values.dtype, 1 - values.numel() / (m * n))[0]
    kind = LAYOUTS.index(layout), DTYPES.index(values.dtype)
    handle, threads = library.load().handle, torch.get_num_threads()
    counts = torch.zeros(-(-m // PANEL) + 1, dtype=torch.int64)
    steps, header = torch.zeros_like(counts), torch.zeros(128, dtype=torch.uint8)
    plan = counts.data_ptr(), steps.data_ptr(), header.data_ptr()
    kept = handle.srt_packed_plan(*kind, metadata.data_ptr(), nibbles, m, n, values.numel(), *plan, threads)
    if kept < 0:
        raise UserError(f"a {pattern} weight of {values.dtype} cannot have the layout {layout!r}")
    if kept != values.numel():
        marked = f"the metadata of a {pattern} weight ({m}, {n}) marks {kept} kept weights"
        raise FormatError(f"{marked}, there are {values.numel()} values")
    packed = pages.empty(handle.srt_packed_bytes(header.data_ptr()))
    pointers = values.data_ptr(), metadata.data_ptr(), nibbles, *plan, packed.data_ptr()
    handle.srt_packed_make(*pointers, threads)
    return packed


def unpack(packed: Tensor, pattern: str, m: int, n: int) -> tuple[Tensor, Tensor]:
    """The canonical values and metadata that ``pack`` was given, bit for bit."""
    found, nibbles = _read_header(packed)
    fmt = get_format(pattern)
    packed = _aligned(packed)
    if nibbles != (fmt.metadata_name == "weight_meta"):
        kind = "2:4 weight" if nibbles else "weight with a bitmask"
        raise BackendError(f"this is a packed {kind}, not a {pattern} one")
    values = torch.empty(fmt.values_shape(m, n, found["nnz"]), dtype=found["dtype"])
    metadata = torch.empty((m, (n + 7) // 8), dtype=torch.uint8)
    # Half of the time of unpack goes into faults of 4 KB pages otherwise (11008 x 4096 bf16 at 50 %: 28 against 14 ms).
    library.load().handle.srt_advise_huge(values.data_ptr(), values.nbytes)
    counts = torch.empty(-(-m // PANEL) + 1, dtype=torch.int64)
    outputs = values.data_ptr(), metadata.data_ptr(), counts.data_ptr()
    arguments = packed.data_ptr(), packed.numel(), m, n, *outputs, torch.get_num_threads()
    if values.numel() != found["nnz"] or library.load().handle.srt_packed_unmake(*arguments) != 0:
        raise BackendError(_not_packed(m, n))
    return values, metadata


def describe(packed: Tensor) -> dict:
    """Layout, dtype, m, n, nnz and bytes of a packed weight, from its header."""
    return _read_header(packed)[0]


def _read_header(packed: Tensor) -> tuple[dict, bool]:
    """The description, and whether the canonical metadata is that of 2:4."""
    header = bytes(_HEADER.size)
    if packed.dtype == torch.uint8 and packed.device.type == "cpu" and packed.dim() == 1 and packed.numel() >= 128:
        header = bytes(packed[: _HEADER.size].tolist())
    magic, layout, dtype, m, n, nnz, nbytes, nibbles = _HEADER.unpack(header)
    if magic != b"srtpack\0":
        raise BackendError("this tensor is not a packed weight; make one with sparse_rt.kernels.packed.pack")
    sizes = {"m": m, "n": n, "nnz": nnz, "nbytes": nbytes}
    return {"layout": LAYOUTS[layout], "dtype": DTYPES[dtype], **sizes}, bool(nibbles)


def canonical_pattern(packed: Tensor) -> str:
    """``2:4``, or ``unstructured`` for every weight with a bitmask, whatever pattern the mask obeys."""
    return "2:4" if _read_header(packed)[1] else "unstructured"


def _can_run(call: Call) -> str | None:
    if call.m * call.n == 0:
        return "the weight is empty"
    return can_run(call)


# The product is csrc/torch_op.c, in torch's dispatcher since the library was loaded.
register_backend("packed_linear", name="native", can_run=_can_run)(
    lambda *call: torch.ops.sparse_rt.packed_linear(*call)
)


def _aligned(packed: Tensor) -> Tensor:
    """The tables in a packed weight are read as 8-byte numbers; a view of something larger may begin anywhere."""
    return packed.clone() if packed.data_ptr() % 8 else packed


def _not_packed(m: int, n: int) -> str:
    return f"this is not a packed ({m}, {n}) weight, or it was made for an instruction set that is switched off now"
