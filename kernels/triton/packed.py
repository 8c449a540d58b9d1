"""Backend ``triton`` of ``packed_linear``: weights in the derived layout of a GPU. The first product imports Triton.

A packed weight is one uint8 tensor: a header of 128 bytes, then what the layout stores, on 16-byte boundaries:

    d4       every other weight: ``d4_layout.pack``; products take as many steps as there are kept weights
    mma_sp   2:4 in bfloat16 or float16: ``fragments.pack_fragments``; the sparse tensor cores read it as it is

A product must not wait for the device, so it does not read the header there: ``pack`` and the first look at a tensor
remember it. A CUDA graph is captured without looking: the number of bytes modulo 16 says the layout, and with m, n and
the dtype of x the place of everything in it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_rt.errors import BackendError, FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels import scratch
from sparse_rt.kernels.backends import Call, register_backend
from sparse_rt.kernels.triton import configs, d4_layout, fragments, ops

logger = logging.getLogger(__name__)

LAYOUTS = ("d4", "mma_sp")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADER_BYTES = 128
# Bytes of a packed weight modulo 16.
_TAGS = {"d4": 0, "mma_sp": 8}
_HEADER = struct.Struct("8sii6q")
_MAGIC = b"srtgpu\0\0"
# Tokens for which the sparse tensor cores read the packed weight, unless a GPU's file says less.
MMA_SP_TOKENS = 16
TRUSTED_ERROR = 1e-2  # relative RMS; rounding the result to bfloat16 makes 2e-3


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


def choose_layout(pattern: str, dtype: torch.dtype, sparsity: float) -> tuple[str, str]:
    """The layout for a weight on a GPU, and the reason in words."""
    if pattern == "2:4":
        reason = _no_fragments(dtype) or (_distrust(dtype) if torch.cuda.is_available() else None)
        if reason is None:
            return "mma_sp", "2:4: the sparse tensor cores read it without decoding"
        return "d4", reason
    return "d4", "as many products as kept weights, no search for their columns"


def pack(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int, layout: str | None = None) -> Tensor:
    """uint8 [bytes]: the derived layout of canonical ``values`` and ``metadata``, made on their device.

    Raises ``FormatError`` where values and metadata contradict each other, ``UserError`` for a layout that such a
    weight cannot have.
    """
    fmt = get_format(pattern)
    fmt.check_header("weight", values.shape, metadata.shape, m, n)
    if metadata.dtype != torch.uint8:
        raise FormatError(f"the metadata of a {pattern} weight is uint8, got {_short(metadata.dtype)}")
    if values.device != metadata.device:
        raise UserError(f"values and metadata must be on one device, got {values.device} and {metadata.device}")
    layout = layout or choose_layout(pattern, values.dtype, 1 - values.numel() / (m * n))[0]
    possible = layout == "d4" or (layout == "mma_sp" and pattern == "2:4" and values.dtype in fragments.DTYPES)
    if not possible or values.dtype not in DTYPES:
        raise UserError(f"a {pattern} weight of {values.dtype} cannot have the layout {layout!r}")
    nibbles, empty_rows = fmt.metadata_name == "weight_meta", 0
    # A tensor made in inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False), torch.no_grad():
        if layout == "d4":
            body, empty_rows = d4_layout.pack(fmt, values, metadata, m, n)
        else:
            parts = fragments.pack_fragments(values, metadata, m, n)
            body = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
        nbytes = HEADER_BYTES + body.numel() + _TAGS[layout]
        header = _Header(layout, values.dtype, m, n, values.numel(), nbytes, nibbles, empty_rows)
        packed = torch.zeros(nbytes, dtype=torch.uint8, device=values.device)
        packed[:HEADER_BYTES] = torch.frombuffer(bytearray(header.to_bytes()), dtype=torch.uint8)
        packed[HEADER_BYTES : HEADER_BYTES + body.numel()] = body
    _headers[packed] = packed.data_ptr(), header
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
        if layout == "d4" and tokens <= _dispatch("d4_tokens", x):
            from sparse_rt.kernels.triton import d4

            return d4.linear(x, d4_layout.sections(_body(packed, layout), m, n, x.dtype), bias, m, n)
        if layout == "mma_sp" and tokens <= _dispatch("mma_sp_tokens", x):
            from sparse_rt.kernels.triton import mma_sp

            if mma_sp.refusal(tokens, x.dtype, x.device) is None:
                return mma_sp.linear(x, *_fragments(packed, m, n), bias, m, n)
        return F.linear(x, _expand(packed, layout, m, n, x.dtype), bias)


def linear_t(dy: Tensor, packed: Tensor, m: int, n: int) -> Tensor:
    """dx = dy W: dy [..., m] -> [..., n]."""
    layout = _check(dy, packed, m, n)
    return dy @ _expand(packed, layout, m, n, dy.dtype)


# The dispatcher's CUDA kernels of torch.ops.sparse_rt.packed_linear are registered in kernels/packed.py.
register_backend("packed_linear", name="triton", priority=ops.PRIORITY, can_run=can_run)(linear)


def _expand(packed: Tensor, layout: str, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """The dense weight, in scratch: valid until the next one."""
    out = scratch.buffer("dense", (m, n), dtype, packed.device)
    if layout == "d4":
        from sparse_rt.kernels.triton import d4

        return d4.expand(d4_layout.sections(_body(packed, layout), m, n, dtype), m, n, out)
    from sparse_rt.kernels.triton import mma_sp

    return mma_sp.expand(*_fragments(packed, m, n), m, n, out)


def _dispatch(name: str, x: Tensor) -> int:
    default = MMA_SP_TOKENS if name == "mma_sp_tokens" else d4_layout.TOKENS
    return configs.dispatch(name, default, x.device)


def _check(x: Tensor, packed: Tensor, m: int, n: int) -> str:
    """The layout of ``packed``, when it is an (m, n) weight of the dtype of ``x``; ``BackendError`` otherwise."""
    known = _known(packed)
    if known is None and _capturing(packed):
        return "mma_sp" if packed.numel() % 16 == _TAGS["mma_sp"] else "d4"
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


def _body(packed: Tensor, layout: str) -> Tensor:
    """What follows the header, at a 16-byte address; a view of something larger may begin anywhere."""
    packed = packed.detach()
    packed = packed if packed.data_ptr() % 16 == 0 else packed.clone()
    return packed[HEADER_BYTES : packed.numel() - _TAGS[layout]]


def _fragments(packed: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    first, second = fragments.shapes(m, n)
    words = _body(packed, "mma_sp").view(torch.int32)
    split = torch.Size(first).numel()
    return words[:split].view(first), words[split:].view(second)


@functools.cache
def _no_fragments(dtype: torch.dtype) -> str | None:
    """Why 2:4 weights of ``dtype`` do not go to the sparse tensor cores, or None."""
    if dtype not in fragments.DTYPES:
        return f"the sparse tensor cores multiply bfloat16 and float16, not {_short(dtype)}"
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this Triton has no Gluon, with which the sparse tensor cores are reached"
    if torch.version.hip is not None:
        return "the sparse tensor cores are reached with PTX, this GPU is not one of NVIDIA's"
    return None


@functools.cache
def _distrust(dtype: torch.dtype) -> str | None:
    from sparse_rt.kernels.triton import mma_sp

    with torch.inference_mode(False), torch.no_grad():
        reason = disagreement(dtype, torch.device("cuda"), mma_sp.linear)
    if reason is not None:
        logger.warning("2:4 weights take the layout d4: %s", reason)
    return reason


def disagreement(dtype: torch.dtype, device: torch.device, linear: Callable[..., Tensor]) -> str | None:
    """Why products with fragments are not trusted on ``device``, or None: a small weight against its dense form.

    Until a GPU has run them, the order of their registers rests on the text of the instruction set and an emulator
    (tests/kernels/triton/ptx.py). A wrong one must not reach a model unseen. Once a process and dtype.
    """
    fmt, (m, n), generator = get_format("2:4"), (40, 548), torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator).to(dtype)
    values, metadata = fmt.compress(weight, fmt.mask_from_scores(weight.abs()))
    dense = fmt.decompress(values, metadata, m, n).double()
    parts = fragments.pack_fragments(values.to(device), metadata.to(device), m, n)
    for tokens in (1, 16):
        x = torch.randn(tokens, n, generator=generator).to(dtype)
        expected = x.double() @ dense.T
        try:
            found = linear(x.to(device), *parts, None, m, n).cpu().double()
        except Exception as error:  # whatever the compiler or the driver has to say
            return f"the kernel of the sparse tensor cores does not run on this GPU ({type(error).__name__}: {error})"
        error = float((found - expected).norm() / expected.norm())
        if not error < TRUSTED_ERROR:
            return f"on this GPU the sparse tensor cores' product has a relative error of {error:.1e}; please report it"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
