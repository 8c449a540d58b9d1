"""From the tensors of a folder to the compressed weight that one tensor-parallel rank keeps.

A vLLM layer joins one or more stored weights (q, k and v; gate and up): its *shards*. Values are ragged, so a rank's
part is not a slice of a tensor: the tensors of a stored weight are held until all are there, checked, cut by rows or
columns through the format, and only the rank's compressed piece is kept. Nothing here knows vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rt.errors import FormatError, UserError
from sparse_rt.exporters.vllm.encodings import CANONICAL, UNSTRUCTURED, Encoding, Piece
from sparse_rt.formats import VALUES_NAME, Format, check_finite, get_format

logger = logging.getLogger(__name__)

# vLLM's own scale of load_format=dummy.
DUMMY_SCALE = 1e-3
_warned_casts: set[tuple[torch.dtype, torch.dtype]] = set()


@dataclass(frozen=True)
class StoredWeight:
    """One compressed weight of the folder: its name there, its pattern and sparsity, how it is stored, and its file.

    What is compressed while it is loaded has no pattern yet: "unstructured" stands for any. The file ("" where headers
    are not at hand) is for messages.
    """

    name: str
    pattern: str
    sparsity: float
    encoding: Encoding = CANONICAL
    file: str = ""

    def shard(self, rows: int) -> Shard:
        """What a rank that keeps ``rows`` rows of it loads."""
        return Shard(self.name, self.pattern, rows, self.encoding, self.file)


@dataclass(frozen=True)
class Shard:
    """One stored weight of a layer: its name in the folder, its pattern, and the rows that this rank keeps of it."""

    name: str
    pattern: str
    rows: int
    encoding: Encoding = CANONICAL
    file: str = ""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return self.encoding.tensor_names(self.pattern)

    @property
    def origin(self) -> str:
        """How messages about it begin."""
        return f"sparse_rt: {self.file}: " if self.file else "sparse_rt: "


@dataclass(frozen=True)
class Cut:
    """What a rank keeps of a stored (m, n) weight; a range shorter than the shard's rows is padded with empty rows."""

    m: int
    n: int
    rows: range
    columns: range


class LayerWeight:
    """Collects the tensors of one layer's shards and joins the rank's pieces: (m, n) = (sum of rows, ``columns``).

    ``format`` is that of the joined weight; where the data decides (``DENSE``), only once it is finished.
    """

    def __init__(self, name: str, shards: list[Shard], columns: int, dtype: torch.dtype, device: torch.device):
        self.name, self.shards, self.columns, self.dtype, self.device = name, shards, columns, dtype, device
        self.format = common_format(get_format(shard.pattern) for shard in shards)
        self.finished = False
        self._staged: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._pieces: dict[int, Piece] = {}
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
        names = shard.tensor_names
        if suffix not in names:
            raise FormatError(
                f"{shard.origin}unexpected tensor {shard.name}.{suffix} in layer {self.name}: config.json says "
                f"{shard.pattern}, which has {' and '.join(names)}"
            )
        staged = self._staged.setdefault(keys, {})
        if suffix in staged or any(key in self._pieces for key in keys):
            raise FormatError(f"{shard.origin}tensor {shard.name}.{suffix} of layer {self.name} was loaded twice")
        # A copy where it has to wait: some loaders of vLLM reuse the buffer for the next tensor.
        staged[suffix] = tensor.to(self.device, copy=len(names) > 1)
        if len(staged) == len(names):
            del self._staged[keys]
            self._take(shard, {name: staged[name] for name in names}, cuts)

    def _take(self, shard: Shard, tensors: dict[str, Tensor], cuts: dict[int, Cut]) -> None:
        m, n = sum(cut.m for cut in cuts.values()), next(iter(cuts.values())).n
        weight = shard.encoding.open(shard.origin + shard.name, shard.pattern, tensors, m, n, self.dtype)
        above = 0
        for key, cut in cuts.items():
            rows = range(above + cut.rows.start, above + cut.rows.stop)
            fmt, values, metadata = weight.cut(rows, cut.columns)
            self._keep(key, len(rows), fmt, self._cast(shard.name, values), metadata)
            above += cut.m

    def _keep(self, key: int, rows: int, fmt: Format, values: Tensor, metadata: Tensor) -> None:
        missing = self.shards[key].rows - rows
        if missing:
            empty = values.new_zeros(missing, self.columns)
            padding = (*fmt.compress(empty, fmt.mask_of(empty)), missing)
            values, metadata = fmt.concat_rows([(values, metadata, rows), padding], self.columns)
        self._pieces[key] = fmt, values, metadata

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
            self._pieces[key] = fmt, values.to(self.device), metadata.to(self.device)

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
        self.format = common_format(piece[0] for piece in self._pieces.values())
        pieces = [
            (*in_format(self.format, *self._pieces[key], shard.rows, self.columns), shard.rows)
            for key, shard in enumerate(self.shards)
        ]
        self.finished, self._pieces, self._staged = True, {}, {}
        return pieces[0][:2] if len(pieces) == 1 else self.format.concat_rows(pieces, self.columns)

    def _missing(self) -> list[str]:
        found = {key: staged for keys, staged in self._staged.items() for key in keys}
        return list(
            dict.fromkeys(
                f"{shard.name}.{suffix} (shard {key})" if len(self.shards) > 1 else f"{shard.name}.{suffix}"
                for key, shard in enumerate(self.shards)
                if key not in self._pieces
                for suffix in shard.tensor_names
                if suffix not in found.get(key, {})
            )
        )


def common_format(formats: Iterable[Format]) -> Format:
    """The format in which weights are joined: a bitmask can say what every other format says."""
    found = set(formats)
    return found.pop() if len(found) == 1 else get_format(UNSTRUCTURED)


def in_format(fmt: Format, own: Format, values: Tensor, metadata: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """(values, metadata) of an (m, n) weight of format ``own`` as ``fmt``, one that can say the same."""
    return (values, metadata) if fmt == own else (values.flatten(), fmt.pack_mask(own.unpack_mask(metadata, m, n)))
