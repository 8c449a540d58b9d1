"""Backend ``triton`` of ``packed_linear``: weights in the derived layout of a GPU. The first product imports Triton.

A packed weight is one uint8 tensor: a header of 128 bytes, then what the layout stores, on 16-byte boundaries:

    d4            ``d4_layout.pack``
    mma_sp        ``fragments.pack_fragments``
    cslt          the metadata, then what ``cslt.compress`` gives
    mma_sp+cslt   the fragments, then what ``cslt.compress`` gives

Which kernel multiplies how many tokens is measured (``dispatch``); all other products expand the weight into scratch
and leave the rest to cuBLAS.

A product must not wait for the device, so it does not read the header there: ``pack`` and the first look at a tensor
remember it. A CUDA graph is captured without looking: the number of bytes modulo 16 says the layout, and with m, n and
the dtype of x the place of everything in it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_rt.errors import BackendError, FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels import scratch
from sparse_rt.kernels.backends import Call, register_backend
from sparse_rt.kernels.triton import cslt, d4_layout, dispatch, fragments, ops
from sparse_rt.kernels.triton.layouts import LAYOUTS, choose_layout, possible_layout

__all__ = ["can_run", "choose_layout", "describe", "linear", "linear_t", "pack", "unpack"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADER_BYTES = 128
# Bytes of a packed weight modulo 16.
_TAGS = {"d4": 0, "mma_sp": 8, "cslt": 4, "mma_sp+cslt": 12}
_HEADER = struct.Struct("8sii6q")
_MAGIC = b"srtgpu\0\0"
# Numbers of tokens that cuSPARSELt's algorithms are timed for when a weight is packed, once per shape.
SWEPT_TOKENS = (16, 512, 2048, 8192)


class _Header(NamedTuple):
    layout: str
    dtype: torch.dtype
    m: int
    n: int
    nnz: int
    nbytes: int
    nibbles: bool  # the canonical metadata is that of 2:4
    empty_rows: int

    def to_bytes(self) -> bytes:
        kind = LAYOUTS.index(self.layout), DTYPES.index(self.dtype)
        return _HEADER.pack(_MAGIC, *kind, *self[2:]).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def from_bytes(cls, header: bytes) -> _Header | None:
        """None where these are not the first bytes of a packed weight."""
        magic, layout, dtype, *numbers, nibbles, empty_rows = _HEADER.unpack(header[: _HEADER.size])
        if magic != _MAGIC:
            return None
        return cls(LAYOUTS[layout], DTYPES[dtype], *numbers, bool(nibbles), empty_rows)


# The address tells whether the data of a tensor has been exchanged.
_headers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def can_run(call: Call) -> str | None:
    """None, or the sentence that says why such a weight is not packed for a GPU."""
    if call.device != "cuda":
        return f"the layouts of the Triton kernels are for CUDA devices, the tensors are on {call.device}"
    if call.m * call.n == 0:
        return "the weight is empty"
    return ops.can_run(call)


def pack(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int, layout: str | None = None) -> Tensor:
    """uint8 [bytes]: the derived layout of canonical ``values`` and ``metadata``, made on their device.

    ``layout`` overrides the choice. What cuSPARSELt's form alone would not give back bit for bit gets mma_sp. Raises
    ``FormatError`` where values and metadata contradict each other, ``UserError`` for a layout that such a weight
    cannot have.
    """
    fmt = get_format(pattern)
    fmt.check_header("weight", values.shape, metadata.shape, m, n)
    if metadata.dtype != torch.uint8:
        raise FormatError(f"the metadata of a {pattern} weight is uint8, got {_short(metadata.dtype)}")
    if values.device != metadata.device:
        raise UserError(f"values and metadata must be on one device, got {values.device} and {metadata.device}")
    layout = layout or possible_layout(pattern, values.dtype, 1 - values.numel() / (m * n), (m, n))
    possible = layout == "d4" or (layout in LAYOUTS and pattern == "2:4" and values.dtype in fragments.DTYPES)
    if not possible or values.dtype not in DTYPES:
        raise UserError(f"a {pattern} weight of {values.dtype} cannot have the layout {layout!r}")
    nibbles, empty_rows = fmt.metadata_name == "weight_meta", 0
    # A tensor made in inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False), torch.no_grad():
        blob = cslt.compress(values, metadata, m, n) if "cslt" in layout else None
        if layout == "cslt" and not torch.equal(_bits(_from_library(blob, metadata, m, n)[0]), _bits(values)):
            layout, blob = "mma_sp", None
        if layout == "d4":
            body, empty_rows = d4_layout.pack(fmt, values, metadata, m, n)
        else:
            parts = (_padded(metadata),) if layout == "cslt" else fragments.pack_fragments(values, metadata, m, n)
            body = torch.cat([_bytes(part) for part in (*parts, blob) if part is not None])
        nbytes = HEADER_BYTES + body.numel() + _TAGS[layout]
        header = _Header(layout, values.dtype, m, n, values.numel(), nbytes, nibbles, empty_rows)
        packed = torch.zeros(nbytes, dtype=torch.uint8, device=values.device)
        packed[:HEADER_BYTES] = torch.frombuffer(bytearray(header.to_bytes()), dtype=torch.uint8)
        packed[HEADER_BYTES : HEADER_BYTES + body.numel()] = body
    _headers[packed] = packed.data_ptr(), header
    if blob is not None:
        limits = dispatch.limits("cslt", pattern, m, n, 0.5, values.dtype, values.device)
        for tokens in SWEPT_TOKENS:
            if tokens in limits:
                cslt.sweep(_blob(packed, m, n, values.dtype), m, n, tokens)
    return packed


def unpack(packed: Tensor, pattern: str, m: int, n: int) -> tuple[Tensor, Tensor]:
    """The canonical values and metadata that ``pack`` was given, bit for bit."""
    header, fmt = _header(packed, m, n), get_format(pattern)
    if header.nibbles != (fmt.metadata_name == "weight_meta"):
        kind = "2:4 weight" if header.nibbles else "weight with a bitmask"
        raise BackendError(f"this is a packed {kind}, not a {pattern} one")
    with torch.no_grad():
        if header.layout == "d4":
            return d4_layout.unpack(fmt, _body(packed, "d4"), m, n, header.dtype, header.empty_rows)
        if header.layout == "cslt":
            metadata = _metadata(packed, m, n)
            return _from_library(_blob(packed, m, n, header.dtype), metadata, m, n)
        return fragments.unpack_fragments(*_fragments(packed, m, n), m, n, header.dtype)


def describe(packed: Tensor) -> dict:
    """Layout, dtype, m, n, nnz and bytes of a packed weight, from its header."""
    header = _header(packed)
    return {name: getattr(header, name) for name in ("layout", "dtype", "m", "n", "nnz", "nbytes")}


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, m: int, n: int) -> Tensor:
    """y = x W^T + bias: x [..., n] -> [..., m], any number of tokens. ``BackendError`` for operands that do not fit."""
    layout = _check(x, packed, m, n)
    if x.dim() == 0 or x.shape[-1] != n or (bias is not None and tuple(bias.shape) != (m,)):
        given = f"x {tuple(x.shape)}" + ("" if bias is None else f" and a bias {tuple(bias.shape)}")
        raise BackendError(f"packed_linear: a ({m}, {n}) weight takes x [..., {n}] and a bias [{m}], got {given}")
    if bias is not None and bias.dtype != x.dtype:
        raise BackendError(f"packed_linear: the bias is {bias.dtype}, x is {x.dtype}; they must be equal")
    tokens = x.numel() // n
    with torch.no_grad():
        kernel = _kernel(packed, layout, tokens, x, m, n)
        if kernel == "d4":
            from sparse_rt.kernels.triton import d4

            return d4.linear(x, d4_layout.sections(_body(packed, layout), m, n, x.dtype), bias, m, n)
        if kernel == "mma_sp":
            from sparse_rt.kernels.triton import mma_sp

            return mma_sp.linear(x, *_fragments(packed, m, n), bias, m, n)
        if kernel == "cslt":
            return cslt.linear(x, _blob(packed, m, n, x.dtype), bias, m, n)
        return F.linear(x, _expand(packed, layout, m, n, x.dtype), bias)


def linear_t(dy: Tensor, packed: Tensor, m: int, n: int) -> Tensor:
    """dx = dy W: dy [..., m] -> [..., n]."""
    layout = _check(dy, packed, m, n)
    return dy @ _expand(packed, layout, m, n, dy.dtype)


# The dispatcher's CUDA kernels of torch.ops.sparse_rt.packed_linear are registered in kernels/packed.py.
register_backend("packed_linear", name="triton", priority=ops.PRIORITY, can_run=can_run)(linear)


def _kernel(packed: Tensor, layout: str, tokens: int, x: Tensor, m: int, n: int) -> str | None:
    """The kernel that was measured to be the fastest for this product; None: expand and leave it to cuBLAS."""
    if layout == "d4":
        limits = dispatch.limits("d4", dispatch.BITMASK, m, n, _sparsity(packed, m, n, x.dtype), x.dtype, x.device)
        return "d4" if tokens in limits else None
    for name in layout.split("+"):
        if tokens in dispatch.limits(name, "2:4", m, n, 0.5, x.dtype, x.device):
            if name == "cslt":
                return name
            from sparse_rt.kernels.triton import mma_sp

            if mma_sp.refusal(tokens, x.dtype, x.device) is None:
                return name
    return None


def _sparsity(packed: Tensor, m: int, n: int, dtype: torch.dtype) -> float:
    """Of a weight in the layout d4; while a graph is captured of an unknown one a lower bound, from its size."""
    known = _known(packed)
    groups = 0 if known else d4_layout.sections(_body(packed, "d4"), m, n, dtype).groups
    return 1 - (known.nnz if known else groups * d4_layout.SLOTS) / (m * n)


def _expand(packed: Tensor, layout: str, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """The dense weight, in scratch: valid until the next one. From cuSPARSELt's form alone it costs a product."""
    out = scratch.buffer("dense", (m, n), dtype, packed.device)
    if layout == "d4":
        from sparse_rt.kernels.triton import d4

        return d4.expand(d4_layout.sections(_body(packed, layout), m, n, dtype), m, n, out)
    if layout == "cslt":
        return cslt.expand(_blob(packed, m, n, dtype), m, n, out)
    from sparse_rt.kernels.triton import mma_sp

    return mma_sp.expand(*_fragments(packed, m, n), m, n, out)


def _check(x: Tensor, packed: Tensor, m: int, n: int) -> str:
    """The layout of ``packed``, when it is an (m, n) weight of the dtype of ``x``; ``BackendError`` otherwise."""
    known = _known(packed)
    if known is None and _capturing(packed):
        return _layout_of(packed)
    header = _header(packed, m, n) if known is None or known[2:4] != (m, n) else known
    if header.dtype != x.dtype:
        raise BackendError(f"packed_linear: x is {x.dtype}, the packed values are {header.dtype}; they must be equal")
    return header.layout


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _known(packed: Tensor) -> _Header | None:
    address, header = _headers.get(packed, (None, None))
    return header if address == packed.data_ptr() else None


def _header(packed: Tensor, m: int | None = None, n: int | None = None) -> _Header:
    """The header, read from the device if need be; ``BackendError`` unless it is that of an (m, n) weight."""
    header = None
    usual = packed.dtype == torch.uint8 and packed.dim() == 1 and packed.is_contiguous() and not packed.is_meta
    if usual and packed.numel() >= HEADER_BYTES:
        header = _known(packed) or _Header.from_bytes(bytes(packed[:HEADER_BYTES].tolist()))
    wanted = m is None or header is None or (header.m, header.n) == (m, n)
    if header is None or header.nbytes != packed.numel() or not wanted:
        kind = "" if m is None else f"({m}, {n}) "
        raise BackendError(
            f"packed_linear: this is not a packed {kind}weight of a GPU; make one with sparse_rt.kernels.packed.pack"
        )
    _headers[packed] = packed.data_ptr(), header
    return header


def _layout_of(packed: Tensor) -> str:
    """The layout, from the size alone."""
    tag = packed.numel() % 16
    return next((layout for layout, known in _TAGS.items() if known == tag), "d4")


def _body(packed: Tensor, layout: str) -> Tensor:
    """What follows the header, at a 16-byte address; a view of something larger may begin anywhere."""
    packed = packed.detach()
    packed = packed if packed.data_ptr() % 16 == 0 else packed.clone()
    return packed[HEADER_BYTES : packed.numel() - _TAGS[layout]]


def _fragments(packed: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    first, second = (torch.Size(shape) for shape in fragments.shapes(m, n))
    words = _body(packed, _layout_of(packed))[: 4 * (first.numel() + second.numel())].view(torch.int32)
    return words[: first.numel()].view(first), words[first.numel() :].view(second)


def _metadata(packed: Tensor, m: int, n: int) -> Tensor:
    """The canonical metadata in the layout cslt."""
    shape = get_format("2:4").metadata_shape(m, n)
    return _body(packed, "cslt")[: torch.Size(shape).numel()].view(shape)


def _blob(packed: Tensor, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """What cuSPARSELt multiplies, [m, elements] of the dtype of the values, behind the other form."""
    layout = _layout_of(packed)
    if layout == "cslt":
        begin = torch.Size(get_format("2:4").metadata_shape(m, n)).numel()
        begin += -begin % 16
    else:
        begin = 4 * sum(torch.Size(shape).numel() for shape in fragments.shapes(m, n))
    return _body(packed, layout)[begin:].view(dtype).view(m, -1)


def _from_library(blob: Tensor, metadata: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Canonical (values, metadata) of cuSPARSELt's form; zeros that are kept lose their sign."""
    dense = cslt.expand(blob, m, n, torch.empty((m, n), dtype=blob.dtype, device=blob.device))
    like = torch.empty((m, n // 2), dtype=blob.dtype, device=blob.device)
    return ops.gather(dense, metadata, "2:4", m, n, like), metadata.clone()


def _padded(metadata: Tensor) -> Tensor:
    flat = metadata.detach().reshape(-1)
    return F.pad(flat, (0, -flat.numel() % 16))


def _bytes(part: Tensor) -> Tensor:
    return part.contiguous().reshape(-1).view(torch.uint8)


def _bits(values: Tensor) -> Tensor:
    return values.detach().contiguous().view(torch.int16)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
