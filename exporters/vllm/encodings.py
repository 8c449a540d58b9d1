"""How a weight lies in the folder that is served, and how a rank's piece of it becomes values and metadata.

    CANONICAL   values and metadata of a sparse-rt folder, in the pattern that is served
    Int8        the same with int8 values and their scales, widened while they are loaded
    BITMASK     values and bitmask of a compressed-tensors folder (sparse-bitmask, sparse-24-bitmask)
    DENSE       an ordinary weight with zeros in it, compressed while it is loaded

Nothing here knows vLLM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rt.errors import FormatError
from sparse_rt.formats import VALUE_DTYPES, VALUES_NAME, Format, check_finite, get_format, normalize_zeros
from sparse_rt.formats.int8 import SCALES_NAME, widen

BITMASK_NAME, DENSE_NAME, UNSTRUCTURED, TWO_FOUR = "weight_bitmask", "weight", "unstructured", "2:4"
# Every name under which a tensor of a weight may come.
TENSOR_NAMES = (VALUES_NAME, "weight_meta", BITMASK_NAME, SCALES_NAME, DENSE_NAME)
# A dense weight that obeys 2:4 is served as 2:4 when it fills so much of the two places a group; one that is sparser
# takes less memory with a bitmask.
FILLED_24 = 0.8

Piece = tuple[Format, Tensor, Tensor]  # format, values, metadata


class Opened(ABC):
    """A whole stored weight (m, n), checked."""

    @abstractmethod
    def cut(self, rows: range, columns: range) -> Piece:
        """The weight of these rows and columns; ``UserError`` where the pattern does not survive the cut."""


class Encoding(ABC):
    name: str

    @abstractmethod
    def tensor_names(self, pattern: str) -> tuple[str, ...]:
        """The tensors that make up one weight, without the name of the module."""

    @abstractmethod
    def open(self, name: str, pattern: str, tensors: dict[str, Tensor], m: int, n: int, dtype: torch.dtype) -> Opened:
        """Check ``tensors`` against a weight ``name`` (m, n); ``FormatError`` names the one that does not fit.

        ``dtype`` is that of the layer, for values that have none of their own.
        """


class _Compressed(Opened):
    def __init__(self, fmt: Format, values: Tensor, metadata: Tensor, m: int, n: int):
        self.format, self.values, self.metadata, self.m, self.n = fmt, values, metadata, m, n

    def cut(self, rows: range, columns: range) -> Piece:
        fmt, values, metadata = self.format, self.values, self.metadata
        if len(rows) != self.m:
            values, metadata = fmt.select_rows(values, metadata, self.m, self.n, rows.start, rows.stop)
        if len(columns) != self.n:
            values, metadata = fmt.select_columns(values, metadata, len(rows), self.n, columns.start, columns.stop)
        return fmt, values, metadata


class _Canonical(Encoding):
    name = "sparse-rt"

    def tensor_names(self, pattern: str) -> tuple[str, ...]:
        return get_format(pattern).tensor_names

    def open(self, name: str, pattern: str, tensors: dict[str, Tensor], m: int, n: int, dtype: torch.dtype) -> Opened:
        fmt, (values, metadata) = get_format(pattern), tensors.values()
        _check_dtypes(name, values, metadata)
        fmt.check_header(name, values.shape, metadata.shape, m, n)
        fmt.check_data(name, values, metadata, m, n)
        return _Compressed(fmt, values, metadata, m, n)


@dataclass(frozen=True)
class Int8(Encoding):
    """``dtype`` is what the header says that values are widened to; None where headers are not at hand."""

    group_size: int | None
    dtype: torch.dtype | None = None
    name = "sparse-rt int8"

    def tensor_names(self, pattern: str) -> tuple[str, ...]:
        return (*get_format(pattern).tensor_names, SCALES_NAME)

    def open(self, name: str, pattern: str, tensors: dict[str, Tensor], m: int, n: int, dtype: torch.dtype) -> Opened:
        fmt, (q, metadata, scales) = get_format(pattern), tensors.values()
        if metadata.dtype != torch.uint8:
            raise FormatError(f"{name}.{fmt.metadata_name} is {metadata.dtype}, metadata are torch.uint8")
        fmt.check_header(name, q.shape, metadata.shape, m, n)
        values = widen(name, fmt, q, scales, metadata, m, n, self.group_size, self.dtype or dtype)
        return _Compressed(fmt, values, metadata, m, n)


class _Bitmask(Encoding):
    """``pattern`` says what the folder promises: 2:4 is kept in its own, faster form from here on."""

    name = "compressed-tensors"

    def tensor_names(self, pattern: str) -> tuple[str, ...]:
        return VALUES_NAME, BITMASK_NAME

    def open(self, name: str, pattern: str, tensors: dict[str, Tensor], m: int, n: int, dtype: torch.dtype) -> Opened:
        values, bits = tensors.values()
        _check_dtypes(name, values, bits)
        stored, values = get_format(UNSTRUCTURED), values.flatten()
        stored.check_header(name, values.shape, bits.shape, m, n)
        stored.check_data(name, values, bits, m, n)
        if pattern != TWO_FOUR:
            return _Compressed(stored, values, bits, m, n)
        mask = stored.unpack_mask(bits, m, n)
        _check_24(name, mask)
        fmt = get_format(TWO_FOUR)
        return _Compressed(fmt, values.view(fmt.values_shape(m, n, values.numel())), fmt.pack_mask(mask), m, n)


class _Dense(Encoding):
    """Every other weight is kept; the pattern follows from the zeros of a rank's piece."""

    name = "dense"

    def tensor_names(self, pattern: str) -> tuple[str, ...]:
        return (DENSE_NAME,)

    def open(self, name: str, pattern: str, tensors: dict[str, Tensor], m: int, n: int, dtype: torch.dtype) -> Opened:
        (weight,) = tensors.values()
        if weight.dtype not in VALUE_DTYPES or tuple(weight.shape) != (m, n):
            raise FormatError(
                f"{name}.weight is {weight.dtype} {tuple(weight.shape)}; a weight to compress while loading is "
                f"({m}, {n}) and {_dtypes()}"
            )
        check_finite(f"{name}.weight", weight)
        return _Zeros(weight)


class _Zeros(Opened):
    def __init__(self, weight: Tensor):
        self.weight = weight

    def cut(self, rows: range, columns: range) -> Piece:
        piece = normalize_zeros(self.weight[rows.start : rows.stop, columns.start : columns.stop])
        mask = piece != 0
        fmt = get_format(TWO_FOUR if _is_24(mask) else UNSTRUCTURED)
        return fmt, *fmt.compress(piece, fmt.mask_of(piece) if fmt.pattern == TWO_FOUR else mask)


def _is_24(mask: Tensor) -> bool:
    m, n = mask.shape
    if n % 4 or int(mask.sum()) < FILLED_24 * m * n / 2:
        return False
    return bool((mask.view(m, n // 4, 4).sum(-1) <= 2).all())


def _check_24(name: str, mask: Tensor) -> None:
    m, n = mask.shape
    counts = mask.view(m, n // 4, 4).sum(-1) if n % 4 == 0 else torch.zeros(1, 1)
    wrong = (counts != 2).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise FormatError(
            f"{name}.bitmask: config.json promises 2:4, row {row}, group {group} keeps {int(counts[row, group])} of 4"
        )


def _check_dtypes(name: str, values: Tensor, metadata: Tensor) -> None:
    if values.dtype not in VALUE_DTYPES or metadata.dtype != torch.uint8:
        raise FormatError(
            f"{name}: values are {values.dtype} and metadata {metadata.dtype}; allowed are {_dtypes()} and torch.uint8"
        )


def _dtypes() -> str:
    return ", ".join(str(dtype) for dtype in VALUE_DTYPES)


CANONICAL, BITMASK, DENSE = _Canonical(), _Bitmask(), _Dense()
