"""The contract of a format: how kept values and their positions are stored, and what makes a mask legal.

A weight of shape (m, n) = (out_features, in_features) is stored as ``weight_values`` (kept weights in row-major
order) and one metadata tensor. The metadata is the truth: a stored value may be 0 or -0.0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats.selection import keep_highest as keep_highest  # others look for it here
from sparse_rt.formats.selection import pieces
from sparse_rt.registry import Registry

VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VALUES_NAME = "weight_values"

_FORMATS: Registry[type[Format]] = Registry(
    "format", ("sparse_rt.formats.two_four", "sparse_rt.formats.bitmask", "sparse_rt.formats.nm")
)


def register_format(cls: type[Format]) -> type[Format]:
    """Class decorator: make a format known under ``cls.name``."""
    return _FORMATS.register(cls.name, cls)


def formats() -> list[type[Format]]:
    return sorted(_FORMATS, key=lambda cls: cls.priority)


def get_format(pattern: str) -> Format:
    """The format that stores ``pattern`` ("2:4", "unstructured", "N:M"); ``UserError`` for anything else."""
    if not isinstance(pattern, str):
        raise UserError(
            f"pattern must be text such as '2:4', got {pattern!r}; in YAML write it in quotes (2:4 is read as a number)"
        )
    for cls in formats():
        found = cls.parse(pattern)
        if found is not None:
            return found
    raise UserError(f"Unknown pattern {pattern!r}; allowed are {', '.join(known_patterns())}")


def is_pattern(text: str) -> bool:
    return any(cls.parse(text) is not None for cls in formats())


def known_patterns() -> list[str]:
    return [cls.name for cls in formats()]


class Format(ABC):
    """One way to store kept values and positions. Instances are cheap, immutable and compare by pattern."""

    name: str
    metadata_name: str
    priority = 0
    default_sparsity: float | None = None
    group: int | None = None  # columns whose mask is chosen together (M of N:M); None when any position may be kept

    def __init__(self, pattern: str):
        self.pattern = pattern

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and other.pattern == self.pattern

    def __hash__(self) -> int:
        return hash(self.pattern)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pattern!r})"

    @property
    def tensor_names(self) -> tuple[str, str]:
        return VALUES_NAME, self.metadata_name

    @classmethod
    @abstractmethod
    def parse(cls, pattern: str) -> Format | None:
        """An instance for ``pattern``, or None when the pattern belongs to another format."""

    @abstractmethod
    def refuse_shape(self, m: int, n: int) -> str | None:
        """Why a weight (m, n) cannot be stored in this pattern, or None."""

    @abstractmethod
    def mask_from_scores(self, scores: Tensor, sparsity: float | None = None, scope: str = "matrix") -> Tensor:
        """Keep the highest scores: [m, n] -> bool [m, n] with exactly the requested count, ties by lower index."""

    @abstractmethod
    def mask_of(self, weight: Tensor) -> Tensor:
        """The mask of an already pruned weight; ``FormatError`` where it does not obey the pattern."""

    @abstractmethod
    def pack_mask(self, mask: Tensor) -> Tensor:
        """bool [m, n] -> metadata."""

    @abstractmethod
    def unpack_mask(self, metadata: Tensor, m: int, n: int) -> Tensor:
        """metadata -> bool [m, n]."""

    @abstractmethod
    def values_shape(self, m: int, n: int, nnz: int) -> tuple[int, ...]: ...

    @abstractmethod
    def metadata_shape(self, m: int, n: int) -> tuple[int, ...]: ...

    @abstractmethod
    def num_values(self, metadata: Tensor, m: int, n: int) -> int:
        """Number of kept weights that the metadata announces."""

    def group_counts(self, metadata: Tensor, m: int, n: int, size: int) -> Tensor:
        """How many weights every ``size`` consecutive columns of a row keep: int64 [m, ceil(n / size)]."""
        mask = torch.nn.functional.pad(self.unpack_mask(metadata, m, n), (0, -n % size))
        return mask.view(m, -1, size).sum(-1)

    def compress(self, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(weight [m, n], bool mask [m, n]) -> (values, metadata); the mask must be legal for the pattern."""
        return self.kept_values(weight, mask), self.pack_mask(mask)

    def kept_values(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The elements of ``weight`` [m, n] where the bool ``mask`` is True, in the shape of the values."""
        m, n = weight.shape
        values, begin = weight.new_empty(int(mask.count_nonzero())), 0
        for rows in pieces(m, n):
            piece = weight[rows].masked_select(mask[rows])
            values[begin : begin + piece.numel()] = piece
            begin += piece.numel()
        return values.view(self.values_shape(m, n, values.numel()))

    def decompress(self, values: Tensor, metadata: Tensor, m: int, n: int) -> Tensor:
        """(values, metadata) -> dense [m, n] in the dtype of the values, zeros elsewhere."""
        dense = values.new_zeros(m, n)
        return dense.masked_scatter_(self.unpack_mask(metadata, m, n), values.flatten())

    def select_rows(self, values: Tensor, metadata: Tensor, m: int, n: int, start: int, stop: int):
        """Rows start..stop-1 as (values, metadata) of a (stop - start, n) weight."""
        begin = self.num_values(metadata[:start], start, n)
        count = self.num_values(metadata[start:stop], stop - start, n)
        piece = values.flatten()[begin : begin + count]
        return piece.view(self.values_shape(stop - start, n, count)).clone(), metadata[start:stop].clone()

    def select_columns(self, values: Tensor, metadata: Tensor, m: int, n: int, start: int, stop: int):
        """Columns start..stop-1 as (values, metadata) of an (m, stop - start) weight.

        ``UserError`` when the pattern does not survive the cut (an N:M group would be split).
        """
        refusal = self.refuse_shape(m, stop - start) or self.refuse_shape(m, start)
        if refusal:
            raise UserError(f"cannot cut columns {start}..{stop} of a {self.pattern} weight: {refusal}")
        mask = self.unpack_mask(metadata, m, n)
        inside = torch.zeros(n, dtype=torch.bool, device=mask.device)
        inside[start:stop] = True
        piece = values.flatten()[inside.expand(m, n)[mask]]
        return (
            piece.view(self.values_shape(m, stop - start, piece.numel())),
            self.pack_mask(mask[:, start:stop].contiguous()),
        )

    def concat_rows(self, pieces: Sequence[tuple[Tensor, Tensor, int]], n: int) -> tuple[Tensor, Tensor]:
        """Stack weights (values, metadata, m_i) of equal n by rows."""
        values = torch.cat([values.flatten() for values, _, _ in pieces])
        m = sum(rows for _, _, rows in pieces)
        return values.view(self.values_shape(m, n, values.numel())), torch.cat([meta for _, meta, _ in pieces])

    def check_header(self, name: str, values_shape: Sequence[int], metadata_shape: Sequence[int], m: int, n: int):
        """Sizes only (no data is read); ``FormatError`` names the tensor and both shapes."""
        refusal = self.refuse_shape(m, n)
        if refusal:
            raise FormatError(f"{name}: a ({m}, {n}) weight cannot be {self.pattern}: {refusal}")
        want = self.metadata_shape(m, n)
        if tuple(metadata_shape) != want:
            raise FormatError(
                f"{name}.{self.metadata_name} has shape {tuple(metadata_shape)}, "
                f"a {self.pattern} weight of ({m}, {n}) needs {want}"
            )
        nnz = 1
        for size in values_shape:
            nnz *= size
        want = self.values_shape(m, n, nnz)
        if tuple(values_shape) != want or nnz > m * n:
            raise FormatError(
                f"{name}.{VALUES_NAME} has shape {tuple(values_shape)}, "
                f"a {self.pattern} weight of ({m}, {n}) needs {want}"
            )

    def check_data(self, name: str, values: Tensor, metadata: Tensor, m: int, n: int) -> None:
        """Everything that needs the data: legal metadata, count equal to the values, finite values."""
        self.check_metadata(name, metadata, m, n)
        announced = self.num_values(metadata, m, n)
        if announced != values.numel():
            raise FormatError(
                f"{name}: {self.metadata_name} marks {announced} kept weights, {VALUES_NAME} holds {values.numel()}"
            )
        check_finite(f"{name}.{VALUES_NAME}", values)

    @abstractmethod
    def check_metadata(self, name: str, metadata: Tensor, m: int, n: int) -> None:
        """``FormatError`` for the first illegal byte, naming the tensor, row and group or column."""


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor Inf; takes no memory, as ``torch.isfinite`` does."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())  # both are NaN where an element is


def check_finite(name: str, tensor: Tensor) -> None:
    """``FormatError`` with the tensor's name and the first position of a NaN or Inf."""
    if all_finite(tensor):
        return
    flat = tensor.flatten()
    index = int((~torch.isfinite(flat)).nonzero()[0])
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), tensor.shape))
    raise FormatError(f"{name} holds {flat[index].item()} at position {position}; weights must be finite")


def check_sparsity(sparsity: float | None) -> float:
    if sparsity is None or not 0.0 <= sparsity < 1.0:
        raise UserError(f"sparsity must be a number from 0 up to (not including) 1, got {sparsity!r}; 0.5 removes half")
    return float(sparsity)


def num_kept(total: int, sparsity: float) -> int:
    """How many of ``total`` weights stay at ``sparsity``, in decimal: 100 * 0.29 is 28.999999999999996 in binary."""
    return total - int(total * Fraction(repr(float(sparsity))))
