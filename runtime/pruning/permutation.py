"""Which input channels of a linear may change places, found by listening, and in which order N:M hurts least.

Input j of a linear is made by rows of other linears: of gate and up before down, of v before o. Where those rows move
together with column j, the block computes the same, and no gather is needed at inference (RIA, Zhang et al., ICLR
2024, section 4). Inputs that the residual stream makes have no such rows.

Nothing here knows a model family or a name. Every linear of a block is replaced by a stand-in that ignores what it is
given and returns random numbers, so that a run costs next to nothing and shows direct links only. Then the numbers of
some rows of one linear are drawn anew, and the inputs that change are those it feeds. Two runs for every binary digit
of a row's index (rows with that digit 1, with that digit 0) tell for every input: no row feeds it (no run changes it),
exactly one does, and which (one of each two runs does), or several (both runs of some digit do).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Channels:
    """The inputs of linear ``consumer`` (n of them) as k bundles of r inputs, which move as one.

    r is 1, or the number of query heads that share a key-value head. ``columns`` int64 [k, r] are the inputs of each
    bundle, ``rows`` names the linears that make them, with the row that makes each bundle, int64 [k]. Bundles of equal
    ``kinds`` int64 [k] may change places: what else they depend on is the same.
    """

    consumer: str
    columns: Tensor
    rows: tuple[tuple[str, Tensor], ...]
    kinds: Tensor

    def order(self, importance: Tensor, group: int) -> Tensor:
        """RIA's heuristic channel reallocation: place i gets bundle ``order[i]``, int64 [k].

        By falling ``importance`` [n] (summed over a bundle) the channels are dealt to the groups of ``group`` columns,
        there and back again, so that important ones do not meet. Groups that kinds share stay as they are.
        """
        importance = importance[self.columns].sum(1)
        order = torch.arange(len(self.columns), device=importance.device)
        places = torch.cat([self.kinds.unsqueeze(1), self.columns // group], dim=1)
        _, place, sizes = places.unique(dim=0, return_inverse=True, return_counts=True)
        whole = sizes[place] == group
        for kind in self.kinds[whole].unique():
            inside = (whole & (self.kinds == kind)).nonzero()[:, 0]
            slots = inside[place[inside].argsort(stable=True)].view(-1, group)
            ranked = inside[importance[inside].argsort(descending=True, stable=True)].view(group, -1)
            for turn in range(group):
                order[slots[:, turn]] = ranked[turn].flip(0) if turn % 2 else ranked[turn]
        return order

    def moves(self, order: Tensor, block: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Linear -> (order of its rows, order of its columns) for ``order`` of the bundles; None: as they are."""
        moves = {self.consumer: (None, _moved(block.get_submodule(self.consumer).in_features, self.columns, order))}
        for name, rows in self.rows:
            known = moves.get(name, (None, None))[0]
            moved = _moved(block.get_submodule(name).out_features, rows, order)
            moves[name] = (moved if known is None else known[moved], None)
        return moves


def _moved(size: int, places: Tensor, order: Tensor) -> Tensor:
    result = torch.arange(size, device=places.device)
    result[places] = places[order]
    return result


@torch.no_grad()
def find_channels(block: nn.Module, hidden: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> list[Channels]:
    """What may be permuted in ``block``, which is called with ``hidden`` [1, T, h] and the other arguments.

    Its weights are not used. T of 16 tokens are enough to hear every channel.
    """
    with _Listening(block) as listening:
        listening.start(lambda: block(hidden, *args, **kwargs))
        return list(_listen(listening))


def ordinary_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of ``block`` that compute what ``nn.Linear`` does, by name."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    }


@dataclass
class _Source:
    """What ``size`` rows of linear ``name`` from ``start`` on do to the inputs of one other linear.

    ``row`` int64 [n] is the one row that feeds an input (-1 where none or several do), ``heard`` bool [n, runs] which
    runs changed it.
    """

    name: str
    start: int
    row: Tensor
    heard: Tensor


@dataclass
class _Listening:
    """Runs a block whose linears return random numbers, and compares what they are given."""

    block: nn.Module
    linears: dict[str, nn.Linear] = field(init=False)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self.linears = ordinary_linears(self.block)
        self._numbers: dict[str, tuple[Tensor, Tensor]] = {}
        self._redrawn: tuple[str, Tensor] | None = None

    def __enter__(self) -> _Listening:
        for seed, (name, linear) in enumerate(self.linears.items()):
            linear.forward = self._stand_in(name, linear, seed)
        return self

    def __exit__(self, *_: Any) -> None:
        for linear in self.linears.values():
            del linear.forward

    def _stand_in(self, name: str, linear: nn.Linear, seed: int):
        def forward(input: Tensor) -> Tensor:
            self.calls[name] = self.calls.get(name, 0) + 1
            self.inputs[name] = input
            shape = (*input.shape[:-1], linear.out_features)
            known = self._numbers.get(name)
            if known is None or known[0].shape != shape:
                generator = torch.Generator().manual_seed(seed)
                first, second = (torch.randn(shape, generator=generator).to(input) for _ in range(2))
                known = self._numbers[name] = first, second
            if self._redrawn is None or self._redrawn[0] != name:
                return known[0].clone()
            return torch.where(self._redrawn[1], known[1], known[0])

        return forward

    def start(self, call) -> None:
        self._call = call
        self._run()
        self.once = [name for name in self.linears if self.calls.get(name) == 1]
        self._usual = dict(self.inputs)
        self._usual_output = self._output

    def _run(self) -> None:
        self.calls.clear()
        self.inputs.clear()
        output = self._call()
        self._output = output[0] if isinstance(output, tuple) else output

    def redraw(self, name: str, rows: Tensor) -> tuple[dict[str, Tensor], bool]:
        """With other numbers in ``rows`` (bool [m]) of ``name``: which inputs of which linears change, and the output.

        Linears without a change are left out.
        """
        self._redrawn = name, rows
        try:
            self._run()
        finally:
            self._redrawn = None
        changed = {}
        for other, usual in self._usual.items():
            now = self.inputs.get(other)
            if now is None or now.shape != usual.shape:
                changed[other] = torch.ones(usual.shape[-1], dtype=torch.bool, device=usual.device)
            else:
                changed[other] = (now != usual).flatten(0, -2).any(0)
        return {k: v for k, v in changed.items() if bool(v.any())}, not torch.equal(self._output, self._usual_output)

    def sources(self, name: str, start: int, size: int, consumers: list[str]) -> dict[str, _Source]:
        """For each of ``consumers``: what rows ``start`` to ``start + size`` of ``name`` do to its inputs."""
        index = torch.arange(self.linears[name].out_features, device=self._usual_output.device) - start
        inside = (index >= 0) & (index < size)
        heard: dict[str, list[Tensor]] = {consumer: [] for consumer in consumers}
        for digit in range(max(1, (size - 1).bit_length())):
            for value in (1, 0):
                changed, _ = self.redraw(name, inside & (((index >> digit) & 1) == value))
                for consumer in consumers:
                    none = torch.zeros(self.width(consumer), dtype=torch.bool, device=index.device)
                    heard[consumer].append(changed.get(consumer, none))
        return {consumer: _read(name, start, torch.stack(runs, dim=1)) for consumer, runs in heard.items()}

    def width(self, name: str) -> int:
        return self.linears[name].in_features


def _read(name: str, start: int, heard: Tensor) -> _Source:
    ones, zeros = heard[:, ::2], heard[:, 1::2]
    row = (ones.long() << torch.arange(ones.shape[1], device=ones.device)).sum(1)
    return _Source(name, start, torch.where((ones ^ zeros).all(1), row, -1), heard)


def _listen(listening: _Listening) -> Iterator[Channels]:
    """Every linear whose inputs can be traced to rows that feed nothing else."""
    found: dict[str, list[tuple[_Source, bool]]] = {name: [] for name in listening.once}
    fixed = set()  # fed by the residual stream, or in another way that cannot be traced
    for name in listening.once:
        every = torch.ones(listening.linears[name].out_features, dtype=torch.bool)
        reached, output = listening.redraw(name, every.to(listening._usual_output.device))
        if output:
            fixed |= set(reached)
        reached = [consumer for consumer in reached if consumer in found]
        if output or not reached:
            continue
        alone = len(reached) == 1
        for consumer, source in listening.sources(name, 0, len(every), reached).items():
            for part in _parts(listening, source, consumer, len(every)):
                found[consumer].append((part, alone))
    for consumer, sources in found.items():
        channels = None if consumer in fixed else _channels(consumer, sources)
        if channels is not None:
            yield channels


def _parts(listening: _Listening, source: _Source, consumer: str, rows: int) -> list[_Source]:
    """A fused producer (gate and up, or q, k and v of equal size) taken apart: as many rows a part as inputs."""
    n = listening.width(consumer)
    if rows <= n or rows % n or bool((source.row >= 0).all()):
        return [source]
    return [listening.sources(source.name, start, n, [consumer])[consumer] for start in range(0, rows, n)]


def _channels(consumer: str, sources: list[tuple[_Source, bool]]) -> Channels | None:
    """Bundles of the inputs of ``consumer``; None where no row feeds them one by one."""
    moving = [source for source, alone in sources if alone and bool((source.row >= 0).all())]
    if not moving:
        return None
    resting = [source.heard for source, _ in sources if not any(source is other for other in moving)]
    _, bundle = torch.stack([source.row for source in moving], dim=1).unique(dim=0, return_inverse=True)
    k, n = int(bundle.max()) + 1, len(bundle)
    if n % k or bool((bundle.bincount() != n // k).any()):
        return None
    columns = bundle.argsort(stable=True).view(k, n // k)
    rows = tuple((source.name, source.start + source.row[columns[:, 0]]) for source in moving)
    if any(len(row.unique()) != k for _, row in rows):
        return None  # a row that feeds several bundles cannot move with one of them
    kinds = torch.zeros(k, dtype=torch.long, device=columns.device)
    if resting:
        _, kind = torch.cat(resting, dim=1).unique(dim=0, return_inverse=True)
        _, kinds = kind[columns].unique(dim=0, return_inverse=True)
    return Channels(consumer, columns, rows, kinds)
