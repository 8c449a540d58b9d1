"""Layout ``d4``: every kept weight with a 4-bit distance to the one before it; for few tokens at any sparsity.

A row is a stream of slots, cut into groups of 16. A group is what one thread reads: 16 values, 16 nibbles and the
column of its first slot (the anchor); nibble j is the distance of slot j from slot j - 1. No group depends on another
one, and the address of x in a slot takes no popcount. Where a distance exceeds 15, slots of value +0.0 fill it up; a
distance that would take more than ``MAX_FILLERS`` of them starts a new group instead, so that a kept weight never takes
more than 16 slots. The rest of a group is filled with +0.0 at distance 0.

Rows are sorted by their number of groups and cut into blocks of ``ROWS``; in a block, group k of row r is number
``k * ROWS + r``. Neighbouring threads so read x at neighbouring columns, and a block is as long as its longest row.

Nothing else is stored: whether a slot is a kept weight or a filler can be told from the slot itself, even where a kept
weight is zero (``unpack``; it is why such a weight at a distance that is a multiple of 15 starts a group).

Sections, each a multiple of 16 bytes (``sections``): starts int64 [blocks + 1] (groups before a block), rows int32 [m]
(the row of a sorted row), values in pieces of 16 bytes [pieces][groups][elements], gaps int64 [groups], anchors int16
(unsigned; int32 above 65536 columns) [groups]. The number of groups is a multiple of 8 and follows from the size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rt.errors import BackendError, FormatError
from sparse_rt.formats.base import Format

SLOTS = 16  # of a group: one nibble each in an int64
ROWS = 8  # of a block
TOKENS = 8  # multiplied in one pass over a weight
MAX_GAP = 15
MAX_FILLERS = 7  # a new group leaves 7.5 slots empty on average
PIECE_BYTES = 16  # what one thread reads in one instruction
# Weights whose slots are placed at a time: a plan takes about 100 bytes for each one that is kept.
CHUNK = 1 << 24
BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Sections:
    """Views of a packed weight."""

    starts: Tensor
    rows: Tensor
    values: Tensor
    gaps: Tensor
    anchors: Tensor

    @property
    def groups(self) -> int:
        return self.gaps.numel()

    @property
    def blocks(self) -> int:
        return self.starts.numel() - 1


def anchor_dtype(n: int) -> torch.dtype:
    return torch.int16 if n <= 1 << 16 else torch.int32


def _table_bytes(m: int) -> tuple[int, int]:
    return -(-((-(-m // ROWS) + 1) * 8) // 16) * 16, -(-m * 4 // 16) * 16


def _group_bytes(n: int, dtype: torch.dtype) -> int:
    return SLOTS * dtype.itemsize + 8 + anchor_dtype(n).itemsize


def nbytes(m: int, n: int, dtype: torch.dtype, groups: int) -> int:
    """Bytes of the sections."""
    return sum(_table_bytes(m)) + groups * _group_bytes(n, dtype)


def sections(body: Tensor, m: int, n: int, dtype: torch.dtype) -> Sections:
    """The sections in ``body`` (uint8, from ``pack``); ``BackendError`` where its size is not possible."""
    groups, rest = divmod(body.numel() - sum(_table_bytes(m)), _group_bytes(n, dtype))
    if rest or groups < 0 or groups % ROWS:
        raise BackendError(f"{body.numel()} bytes are not a ({m}, {n}) weight of {dtype} in the layout d4")
    starts, rows = _table_bytes(m)
    sizes = starts, rows, groups * SLOTS * dtype.itemsize, groups * 8, groups * anchor_dtype(n).itemsize
    parts = body.split(sizes)
    return Sections(
        starts=parts[0].view(torch.int64)[: -(-m // ROWS) + 1],
        rows=parts[1].view(torch.int32)[:m],
        values=parts[2].view(dtype).view(SLOTS * dtype.itemsize // PIECE_BYTES, groups, PIECE_BYTES // dtype.itemsize),
        gaps=parts[3].view(torch.int64),
        anchors=parts[4].view(anchor_dtype(n)),
    )


@dataclass(frozen=True)
class _Plan:
    """Where the kept weights of some rows go, in canonical order."""

    rows: Tensor  # int64 [nnz], from the first of these rows
    columns: Tensor  # int64 [nnz]
    slots: Tensor  # int64 [nnz], in the stream of the row
    fillers: Tensor  # int64 [nnz], in front of it
    gaps: Tensor  # int64 [nnz], distance from the slot before: 0 .. 15
    groups: Tensor  # int64 [rows]


def _plan(fmt: Format, values: Tensor, metadata: Tensor, m: int, n: int) -> _Plan:
    """Place the first weights of ``values`` (integers of their size): all that ``metadata`` [m, ...] marks."""
    rows, columns = fmt.unpack_mask(metadata, m, n).nonzero().unbind(1)
    count = rows.numel()
    if count > values.numel():
        raise FormatError(f"the metadata of a {fmt.pattern} weight marks more kept weights than there are values")
    groups = torch.zeros(m, dtype=torch.int64, device=rows.device)
    if count == 0:
        return _Plan(rows, columns, rows, rows, rows, groups)
    row_starts = torch.ones_like(rows, dtype=torch.bool)
    row_starts[1:] = rows[1:] != rows[:-1]
    gaps = columns.diff(prepend=columns[:1])
    fillers = (gaps - 1) // MAX_GAP
    # As a filler reads a kept +0.0 that is reached by a distance of 15.
    ambiguous = (values[:count] == 0) & (gaps % MAX_GAP == 0)
    run_starts = row_starts | (fillers > MAX_FILLERS) | ambiguous
    fillers = fillers.masked_fill(run_starts, 0)
    gaps = (gaps - fillers * MAX_GAP).masked_fill(run_starts, 0)

    # A run (from one start to the next) fills whole groups; `within` is the slot in its run.
    ends = (fillers + 1).cumsum(0)
    run = run_starts.cumsum(0) - 1
    firsts = run_starts.nonzero().squeeze(1)
    within = ends - ends[firsts][run]
    lasts = torch.cat((firsts[1:] - 1, firsts.new_tensor([count - 1])))
    run_groups = within[lasts] // SLOTS + 1
    before = run_groups.cumsum(0) - run_groups
    row_firsts = row_starts.nonzero().squeeze(1)
    row_before = before[run[row_firsts]][row_starts.cumsum(0) - 1]
    slots = (before[run] - row_before) * SLOTS + within
    row_lasts = torch.cat((row_firsts[1:] - 1, row_firsts.new_tensor([count - 1])))
    groups[rows[row_lasts]] = slots[row_lasts] // SLOTS + 1
    return _Plan(rows, columns, slots, fillers, gaps, groups)


def pack(fmt: Format, values: Tensor, metadata: Tensor, m: int, n: int) -> tuple[Tensor, int]:
    """(uint8 [bytes], number of rows without a weight) of canonical tensors, on their device.

    ``FormatError`` where values and metadata contradict each other.
    """
    bits = values.detach().contiguous().view(-1).view(BITS[values.element_size()])
    step = max(1, CHUNK // n)
    chunks = [(first, min(first + step, m)) for first in range(0, m, step)]
    counts, done, placed = [], 0, []
    for first, last in chunks:
        plan = _plan(fmt, bits[done:], metadata[first:last], last - first, n)
        counts.append(plan.groups)
        placed.append(done)
        done += plan.rows.numel()
    if done != bits.numel():
        raise FormatError(
            f"the metadata of a {fmt.pattern} weight ({m}, {n}) marks {done} kept weights, "
            f"there are {bits.numel()} values"
        )
    groups = torch.cat(counts)
    order = groups.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(m, device=order.device))
    starts = torch.nn.functional.pad((groups[order][::ROWS] * ROWS).cumsum(0), (1, 0))
    body = torch.zeros(nbytes(m, n, values.dtype, int(starts[-1])), dtype=torch.uint8, device=values.device)
    out = sections(body, m, n, values.dtype)
    out.starts.copy_(starts)
    out.rows.copy_(order)
    nibbles = torch.zeros(out.groups * SLOTS, dtype=torch.uint8, device=values.device)
    for (first, last), begin in zip(chunks, placed, strict=True):
        plan = plan if len(chunks) == 1 else _plan(fmt, bits[begin:], metadata[first:last], last - first, n)
        _write(out, nibbles, plan, bits[begin : begin + plan.rows.numel()], starts, rank[first:last])
    pairs = nibbles.view(-1, 2)
    out.gaps.copy_((pairs[:, 0] | pairs[:, 1] << 4).view(torch.int64))
    return body, int((groups == 0).sum())


def _write(out: Sections, nibbles: Tensor, plan: _Plan, bits: Tensor, starts: Tensor, rank: Tensor) -> None:
    """Write the kept weights of some rows, and the fillers in front of them, to their places."""
    rank = rank[plan.rows]
    base = starts[rank // ROWS] + rank % ROWS

    def place(slots: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        return base + slots // SLOTS * ROWS, slots % SLOTS

    group, slot = place(plan.slots, base)
    pieces = out.values.view(bits.dtype)
    elements = pieces.shape[2]
    pieces[slot // elements, group, slot % elements] = bits
    opens = slot == 0
    nibbles[group * SLOTS + slot] = plan.gaps.masked_fill(opens, 0).to(torch.uint8)
    out.anchors[group[opens]] = plan.columns[opens].to(out.anchors.dtype)

    of = plan.fillers.nonzero().squeeze(1)
    of = of.repeat_interleave(plan.fillers[of])
    ahead = torch.arange(1, of.numel() + 1, device=of.device)
    ends = plan.fillers.cumsum(0)
    ahead = ends[of] - ahead  # fillers between this one and its weight
    columns = plan.columns[of] - plan.gaps[of] - ahead * MAX_GAP
    group, slot = place(plan.slots[of] - 1 - ahead, base[of])
    opens = slot == 0
    # A filler opens a group: nibble 0, otherwise 0, is 1 and belongs to the column.
    nibbles[group * SLOTS + slot] = torch.where(opens, 1, MAX_GAP).to(torch.uint8)
    out.anchors[group[opens]] = (columns[opens] - 1).to(out.anchors.dtype)


def unpack(fmt: Format, body: Tensor, m: int, n: int, dtype: torch.dtype, empty_rows: int) -> tuple[Tensor, Tensor]:
    """The (values, metadata) that ``pack`` was given, bit for bit."""
    held = sections(body, m, n, dtype)
    block = torch.arange(held.blocks, device=body.device).repeat_interleave(held.starts.diff())
    number = torch.arange(held.groups, device=body.device) - held.starts[block]
    ranked = block * ROWS + number % ROWS
    packed_gaps = held.gaps.view(torch.uint8).view(-1, SLOTS // 2)
    gaps = torch.stack((packed_gaps & 15, packed_gaps >> 4), dim=-1).flatten(1)
    anchors = held.anchors.to(torch.int32)
    if held.anchors.dtype == torch.int16:
        anchors &= 0xFFFF
    columns = anchors[:, None] + gaps.cumsum(1, dtype=torch.int32)
    bits = held.values.view(BITS[dtype.itemsize]).transpose(0, 1).flatten(1)
    kept = (gaps != 0) & ~((gaps == MAX_GAP) & (bits == 0))
    # An unused group has the anchor 0, which the second group of a row cannot have.
    used = (ranked < m - empty_rows) & ((number < ROWS) | (anchors != 0))
    kept[:, 0] = used & (gaps[:, 0] == 0)
    rows = held.rows[ranked.clamp_max(m - 1)].to(torch.int64)
    places = (rows[:, None] * n + columns)[kept]
    mask = torch.zeros(m * n, dtype=torch.bool, device=body.device)
    dense = torch.zeros(m * n, dtype=bits.dtype, device=body.device)
    mask[places] = True
    dense[places] = bits[kept]
    values, metadata = fmt.compress(dense.view(m, n), mask.view(m, n))
    return values.view(dtype), metadata
