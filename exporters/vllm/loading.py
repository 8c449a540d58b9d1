"""From the tensors of a folder to the compressed weight that one tensor-parallel rank keeps.

A vLLM layer joins one or more stored weights (q, k and v; gate and up): its *shards*. Values are ragged, so a rank's
part is not a slice of a tensor: the two tensors of a stored weight are held until both are there, checked, cut by rows
or columns through the format, and only the rank's compressed piece is kept. Nothing here knows vLLM.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import VALUE_DTYPES, VALUES_NAME, Format, check_finite, get_format

logger = logging.getLogger(__name__)

# vLLM's own scale of load_format=dummy.
DUMMY_SCALE = 1e-3
_warned_casts: set[tuple[torch.dtype, torch.dtype]] = set()


@dataclass(frozen=True)
class Shard:
    """One stored weight of a layer: its name in the folder, its pattern, and the rows that this rank keeps of it."""

    name: str
    pattern: str
    rows: int


@dataclass(frozen=True)
class Cut:
    """What a rank keeps of a stored (m, n) weight; a range shorter than the shard's rows is padded with empty rows."""

    m: int
    n: int
    rows: range
    columns: range


class LayerWeight:
    """Collects the tensors of one layer's shards and joins the rank's pieces: (m, n) = (sum of rows, ``columns``)."""

    def __init__(self, name: str, shards: list[Shard], columns: int, dtype: torch.dtype, device: torch.device):
        self.name, self.shards, self.columns, self.dtype, self.device = name, shards, columns, dtype, device
        patterns = {shard.pattern for shard in shards}
        # Shards of different patterns are joined as a bitmask, which can say what every other pattern says.
        self.format: Format = get_format(patterns.pop() if len(patterns) == 1 else "unstructured")
        self.finished = False
        self._staged: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._pieces: dict[int, tuple[Tensor, Tensor]] = {}
        for shard in shards:
            refusal = get_format(shard.pattern).refuse_shape(shard.rows, columns)
            if refusal:
                raise UserError(
                    f"sparse_rt: {shard.name}: the part of one rank is ({shard.rows}, {columns}) and cannot be "
                    f"{shard.pattern}: {refusal}; serve with a smaller --tensor-parallel-size"
                )

    @property
    def m(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def by_rows(self, key: int, index: int = 0, count: int = 1) -> Cut:
        """Part ``index`` of ``count`` equal ones along the rows of shard ``key`` (the whole shard by default)."""
        rows = self.shards[key].rows
        return Cut(rows * count, self.columns, range(index * rows, (index + 1) * rows), range(self.columns))

    def by_columns(self, index: int, count: int) -> Cut:
        """Part ``index`` of ``count`` equal ones along the columns of the only shard."""
        columns = range(index * self.columns, (index + 1) * self.columns)
        return Cut(self.shards[0].rows, self.columns * count, range(self.shards[0].rows), columns)

    def stage(self, suffix: str, tensor: Tensor, cuts: dict[int, Cut]) -> None:
        """Take the tensor ``suffix`` of the stored weight that holds the shards ``cuts``, stacked by rows.

        Raises ``FormatError`` for a tensor that the pattern does not have, that comes twice, or whose shape, dtype or
        content contradicts the format, and ``NotImplementedError`` once the layer is finished.
        """
        if self.finished:
            raise NotImplementedError(
                f"sparse_rt: layer {self.name} is loaded; changing the weights of a running engine (reload_weights, "
                "refit) is not supported, start a new engine"
            )
        keys = tuple(cuts)
        shard = self.shards[keys[0]]
        names = get_format(shard.pattern).tensor_names
        if suffix not in names:
            raise FormatError(
                f"sparse_rt: unexpected tensor {shard.name}.{suffix} in layer {self.name}: config.json says "
                f"{shard.pattern}, which has {' and '.join(names)}"
            )
        staged = self._staged.setdefault(keys, {})
        if suffix in staged or any(key in self._pieces for key in keys):
            raise FormatError(f"sparse_rt: tensor {shard.name}.{suffix} of layer {self.name} was loaded twice")
        # A copy: some loaders of vLLM reuse the buffer for the next tensor.
        staged[suffix] = tensor.to(self.device, copy=True)
        if len(staged) == len(names):
            del self._staged[keys]
            self._take(shard.name, *(staged[name] for name in names), cuts)

    def _take(self, name: str, values: Tensor, metadata: Tensor, cuts: dict[int, Cut]) -> None:
        fmt = get_format(self.shards[next(iter(cuts))].pattern)
        m, n = sum(cut.m for cut in cuts.values()), next(iter(cuts.values())).n
        label = f"sparse_rt: {name}"
        if values.dtype not in VALUE_DTYPES or metadata.dtype != torch.uint8:
            raise FormatError(
                f"{label}: values are {values.dtype} and metadata {metadata.dtype}; allowed are "
                f"{', '.join(str(dtype) for dtype in VALUE_DTYPES)} and torch.uint8"
            )
        fmt.check_header(label, values.shape, metadata.shape, m, n)
        fmt.check_data(label, values, metadata, m, n)
        values = self._cast(name, values)
        above = 0
        for key, cut in cuts.items():
            rows = range(above + cut.rows.start, above + cut.rows.stop)
            self._pieces[key] = self._cut(fmt, values, metadata, m, n, rows, cut.columns, self.shards[key])
            above += cut.m

    def _cut(self, fmt, values, metadata, m, n, rows, columns, shard) -> tuple[Tensor, Tensor]:
        if len(rows) != m:
            values, metadata = fmt.select_rows(values, metadata, m, n, rows.start, rows.stop)
        if len(columns) != n:
            values, metadata = fmt.select_columns(values, metadata, len(rows), n, columns.start, columns.stop)
        if len(rows) < shard.rows:
            empty = values.new_zeros(shard.rows - len(rows), len(columns))
            padding = (*fmt.compress(empty, fmt.mask_of(empty)), len(empty))
            values, metadata = fmt.concat_rows([(values, metadata, len(rows)), padding], len(columns))
        if fmt != self.format:
            mask = fmt.unpack_mask(metadata, shard.rows, len(columns))
            values, metadata = values.flatten(), self.format.pack_mask(mask)
        return values, metadata

    def _cast(self, name: str, values: Tensor) -> Tensor:
        """Values in the dtype of the model; the mask stays as it is, also where a value becomes 0."""
        if values.dtype == self.dtype:
            return values
        pair = values.dtype, self.dtype
        if pair not in _warned_casts:
            _warned_casts.add(pair)
            logger.warning("sparse_rt: the folder holds %s values, the model runs in %s: values are converted", *pair)
        cast = values.to(self.dtype)
        try:
            check_finite(name, cast)
        except FormatError as error:
            raise UserError(
                f"sparse_rt: {name}.{VALUES_NAME} does not fit {self.dtype}; serve with --dtype bfloat16"
            ) from error
        return cast

    def fill(self, sparsity: float) -> None:
        """Small random values under a random legal mask (vLLM's ``load_format=dummy``)."""
        generator = torch.Generator().manual_seed(0)
        for key, shard in enumerate(self.shards):
            fmt = get_format(shard.pattern)
            scores = torch.rand((shard.rows, self.columns), generator=generator, device="cpu")
            weight = ((scores - 0.5) * DUMMY_SCALE).to(self.dtype)
            values, metadata = fmt.compress(weight, fmt.mask_from_scores(scores, sparsity))
            whole = range(shard.rows), range(self.columns)
            piece = self._cut(fmt, values, metadata, shard.rows, self.columns, *whole, shard)
            self._pieces[key] = tuple(tensor.to(self.device) for tensor in piece)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(values, metadata) of the joined weight; ``FormatError`` names every tensor that never came."""
        if self.finished:
            raise NotImplementedError(f"sparse_rt: layer {self.name} is loaded; reload_weights is not supported")
        missing = self._missing()
        if missing:
            raise FormatError(
                f"sparse_rt: layer {self.name} is incomplete, missing {', '.join(missing)}; "
                "check the folder with `sparse-rt verify` and copy or convert it again"
            )
        pieces = [(*self._pieces[key], shard.rows) for key, shard in enumerate(self.shards)]
        self.finished, self._pieces, self._staged = True, {}, {}
        return pieces[0][:2] if len(pieces) == 1 else self.format.concat_rows(pieces, self.columns)

    def _missing(self) -> list[str]:
        found = {key: staged for keys, staged in self._staged.items() for key in keys}
        return list(
            dict.fromkeys(
                f"{shard.name}.{suffix} (shard {key})" if len(self.shards) > 1 else f"{shard.name}.{suffix}"
                for key, shard in enumerate(self.shards)
                if key not in self._pieces
                for suffix in get_format(shard.pattern).tensor_names
                if suffix not in found.get(key, {})
            )
        )
