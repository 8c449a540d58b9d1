"""int8 values: the kept weights of a format as integers with a float32 scale a row, or a group of columns of a row.

    weight[r, c] = q * scale[r, c // group_size]        q in -127..127, symmetric

Groups are counted in columns of the dense matrix, whatever is kept of them, so that a scale is found without counting
bits. Values lie in row-major order, so the kept values of one group are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats.base import VALUE_DTYPES, VALUES_NAME, Format, check_finite

PLAIN, INT8 = "plain", "int8"
SCALES_NAME = "weight_scale"
GROUP_SIZES = (64, 128, 256)
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in VALUE_DTYPES}
HIGHEST = 127
REMEDY = "copy the folder again or export it again"
# A smaller scale would have too few bits itself, and processors that flush denormals would read it as 0.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def check_group_size(group_size: int | None) -> None:
    """``UserError`` for a group size that the format does not have."""
    if group_size is not None and (type(group_size) is not int or group_size not in GROUP_SIZES):
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise UserError(f"group_size {group_size!r} is unknown; allowed are {sizes} columns, or null for whole rows")


def scales_shape(m: int, n: int, group_size: int | None) -> tuple[int, int]:
    return m, 1 if group_size is None else -(-n // group_size)


def quantize(
    fmt: Format, values: Tensor, metadata: Tensor, m: int, n: int, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """(q int8 in the shape of ``values``, scales float32 [m, g]) of the kept ``values`` of an (m, n) weight.

    The scale of a group is its largest absolute value / 127, computed in float32; q is value / scale, rounded half to
    even. A group without a kept value other than 0 has scale 0 and q = 0 everywhere: nothing is divided by it. Raises
    ``FormatError`` for NaN or Inf.
    """
    check_group_size(group_size)
    check_finite(VALUES_NAME, values)
    exact = values.float()
    largest = _in_groups(fmt.decompress(exact.abs(), metadata, m, n), group_size).amax(-1)
    scales = torch.where(largest > 0, (largest / HIGHEST).clamp_min(_SMALLEST_SCALE), 0.0)
    divisors = _of_values(fmt, torch.where(scales > 0, scales, 1.0), metadata, m, n, group_size)
    return (exact / divisors).round().clamp(-HIGHEST, HIGHEST).to(torch.int8), scales


def dequantize(
    fmt: Format,
    q: Tensor,
    scales: Tensor,
    metadata: Tensor,
    m: int,
    n: int,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """q * scale in float32, rounded once to ``dtype``: values in the shape of ``q``."""
    return (q.float() * _of_values(fmt, scales, metadata, m, n, group_size)).to(dtype)


def check_header(
    name: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: Sequence[int],
    m: int,
    n: int,
    group_size: int | None,
) -> None:
    """Dtypes of values and scales, and the scales' ``shape``; what a plain weight has is checked by its format."""
    values_dtype, scales_dtype = dtypes
    if values_dtype != torch.int8:
        raise FormatError(
            f"{name}.{VALUES_NAME} is {values_dtype}, a weight with values 'int8' needs torch.int8; {REMEDY}"
        )
    want = scales_shape(m, n, group_size)
    if scales_dtype != torch.float32 or tuple(shape) != want:
        per = "row" if group_size is None else f"{group_size} columns"
        raise FormatError(
            f"{name}.{SCALES_NAME} is {scales_dtype} {tuple(shape)}, an int8 weight of ({m}, {n}) with a scale per "
            f"{per} needs torch.float32 {want}; {REMEDY}"
        )


def check_data(
    name: str, fmt: Format, q: Tensor, scales: Tensor, metadata: Tensor, m: int, n: int, group_size: int | None
) -> None:
    """Everything that needs the data: what a plain weight is checked for, and legal integers and scales."""
    check_header(name, (q.dtype, scales.dtype), scales.shape, m, n, group_size)
    fmt.check_data(name, q, metadata, m, n)
    wrong = (q.flatten() < -HIGHEST).nonzero()
    if len(wrong):
        row, column = fmt.unpack_mask(metadata, m, n).nonzero()[int(wrong[0])].tolist()
        raise FormatError(
            f"{name}.{VALUES_NAME} holds -128 at row {row}, column {column}; int8 values lie in -{HIGHEST}..{HIGHEST}; "
            f"{REMEDY}"
        )
    wrong = (~(torch.isfinite(scales) & (scales >= 0))).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise FormatError(
            f"{name}.{SCALES_NAME} holds {scales[row, group].item()} at row {row}, group {group}; scales are finite "
            f"and not negative; {REMEDY}"
        )


def widen(
    name: str,
    fmt: Format,
    q: Tensor,
    scales: Tensor,
    metadata: Tensor,
    m: int,
    n: int,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """What ``dequantize`` gives for a stored weight ``name``, checked before and after."""
    check_data(name, fmt, q, scales, metadata, m, n, group_size)
    values = dequantize(fmt, q, scales, metadata, m, n, group_size, dtype)
    check_finite(f"{name}.{VALUES_NAME} * {SCALES_NAME} as {dtype}", values)
    return values


def _in_groups(matrix: Tensor, group_size: int | None) -> Tensor:
    """[m, n] -> [m, g, columns of a group]; what the last group lacks is filled with 0."""
    m, n = matrix.shape
    size = n if group_size is None else group_size
    return torch.nn.functional.pad(matrix, (0, -n % size)).view(m, -1, size)


def _of_values(fmt: Format, scales: Tensor, metadata: Tensor, m: int, n: int, group_size: int | None) -> Tensor:
    """The scale of every kept value, in a shape that broadcasts to that of the values: float32."""
    shape = fmt.values_shape(m, n, 0)
    size = n if group_size is None else group_size
    if len(shape) == 1:
        return scales.flatten().repeat_interleave(fmt.group_counts(metadata, m, n, size).flatten())
    kept = shape[1]  # of every row
    if scales.shape[1] == 1:
        return scales
    if fmt.group and size % fmt.group == 0:
        return scales.repeat_interleave(size * kept // n, dim=1)[:, :kept]
    return scales.flatten().repeat_interleave(fmt.group_counts(metadata, m, n, size).flatten()).view(m, kept)
