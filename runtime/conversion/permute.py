"""``convert --permute``: block by block, input channels in an order that N:M hurts less, and the rows that make them.

Everything that is read from the source for a permuted block passes ``Permuting.arranged``: weights before they are
pruned, biases and dense weights before they are copied. The orders are kept with the other facts, so a resumed run
writes the same without finding them again.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_rt.conversion.plan import Decision, Plan
from sparse_rt.errors import UserError
from sparse_rt.formats import get_format
from sparse_rt.pruning import ActivationStats, BlockRunner, SharedStats
from sparse_rt.pruning.permutation import Channels, find_channels, ordinary_linears
from sparse_rt.pruning.reconstruct import widened
from sparse_rt.pruning.ria import ria_scores

TOKENS = 16  # of the sequence that links are listened for with, and outputs compared on
# Outputs before and after may differ by rounding in float32: by this share of what the block adds to its input, and of
# the whole (the residual stream can be far louder than what is added).
TOLERANCE = 1e-4, 1e-6

Moves = dict[str, tuple[Tensor | None, Tensor | None]]  # linear or checkpoint key -> order of rows, of columns


class Permuting:
    """The permutation of every block, found once and remembered in the facts of the conversion."""

    def __init__(self, plan: Plan, facts, done: Collection[str]):
        """``done`` names what an earlier run wrote; ``UserError`` where the orders it wrote them in are lost."""
        self.plan, self.facts = plan, facts
        for index, keys in enumerate(plan.blocks):
            written = any((d := plan.decisions.get(key)) and d.pattern and d.name in done for key in keys)
            if written and self._fact(index) not in facts.known:
                raise UserError("cannot resume: the notes of the unfinished conversion are damaged; start over")
        self._block_of = {key: index for index, keys in enumerate(plan.blocks) for key in keys}
        self._current: tuple[int, Moves] | None = None
        self._calls: BlockRunner | None = None

    def start(self, runner: BlockRunner, tokens: Tensor) -> None:
        """Record how the blocks are called with a few tokens; call it while no block is open."""
        self._calls = BlockRunner(runner.model, runner.load, runner.device)
        self._calls.start(tokens[:1, :TOKENS])

    def arranged(self, key: str, tensor: Tensor) -> Tensor:
        """Tensor ``key`` of the source with its rows and columns in the order of its block."""
        index = self._block_of.get(key)
        rows, columns = self._moves(index).get(key, (None, None)) if index is not None else (None, None)
        return _arranged(tensor, rows, columns)

    def _moves(self, index: int) -> Moves:
        if self._current is None or self._current[0] != index:
            known = self.facts.known.get(self._fact(index), {}).get("orders", {})
            self._current = index, {key: (_decoded(rows), _decoded(columns)) for key, (rows, columns) in known.items()}
        return self._current[1]

    def _fact(self, index: int) -> str:
        return f"permutation of {self.plan.blocks_name}.{index}"

    def restore(self, runner: BlockRunner, index: int) -> None:
        """Arrange the open block as an earlier run did."""
        for name, module in runner.blocks[index].named_modules():
            for part, parameter in module.named_parameters(recurse=False):
                moves = self._moves(index).get(self._key(index, f"{name}.{part}"))
                if moves:
                    _set(module, part, _arranged(parameter, *moves))

    def choose(self, runner: BlockRunner, index: int, decisions: dict[str, Decision], stats: SharedStats) -> None:
        """Permute the open, unpruned block and the statistics of its linears (by name inside the block).

        A linear stays as it is where the order would keep less of RIA's scores, or change what the block computes.
        """
        block, moves, gains, undone = runner.blocks[index], {}, {}, []
        before = self._outputs(runner, index)
        hidden = runner.hidden[0][:, :TOKENS].to(runner.device)
        for channels in find_channels(block, hidden, *self._calls.call(index, 0)):
            decision, seen = decisions.get(channels.consumer), stats.get(channels.consumer)
            if decision is None or seen is None or not seen.sequences or not get_format(decision.pattern).group:
                continue
            order, gain = _best(channels, block, decision.pattern, seen)
            if order is None:
                continue
            wanted = channels.moves(order, block)
            _apply(block, wanted)
            if not _same(before, self._outputs(runner, index), channels.consumer, hidden):
                _apply(block, {name: tuple(map(_inverse, orders)) for name, orders in wanted.items()})
                undone.append(decision.name)
                continue
            seen.permute(wanted[channels.consumer][1])
            gains[decision.name] = gain
            for name, (rows, columns) in wanted.items():
                known = moves.get(name, (None, None))
                moves[name] = _after(known[0], rows), _after(known[1], columns)
        self._remember(index, moves, gains, undone)

    def _remember(self, index: int, moves: Moves, gains: dict[str, list[float]], undone: list[str]) -> None:
        orders: Moves = {}
        for name, (rows, columns) in moves.items():
            orders[self._key(index, f"{name}.weight")] = rows, columns
            bias = self._key(index, f"{name}.bias")
            if bias is not None and rows is not None:
                orders[bias] = rows, None
        encoded = {key: [_encoded(rows), _encoded(columns)] for key, (rows, columns) in orders.items()}
        self.facts.add(self._fact(index), orders=encoded, permuted=gains, permutation_undone=undone)
        self._current = None

    def _key(self, index: int, parameter: str) -> str | None:
        return self.plan.structure.key_of(f"{self.plan.blocks_name}.{index}.{parameter}")

    @torch.no_grad()
    def _outputs(self, runner: BlockRunner, index: int) -> dict[str, Tensor]:
        """What the open block ("") and every linear in it give for the first tokens of a sequence, in float32."""
        block, outputs = runner.blocks[index], {}
        args, kwargs = widened(self._calls.call(index, 0))
        with _in_float32(block, outputs):
            hidden = runner.hidden[0][:, :TOKENS].to(runner.device, torch.float32)
            output = block(hidden, *args, **kwargs)
        return outputs | {"": output[0] if isinstance(output, tuple) else output}


def facts_of(known: dict[str, dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """For report and manifest: the permuted weights, with the share of RIA's scores that is kept before and after."""
    permuted = {name: gain for fact in known.values() for name, gain in fact.get("permuted", {}).items()}
    undone = [name for fact in known.values() for name in fact.get("permutation_undone", ())]
    if undone:
        plan.notes.append(
            f"--permute left {len(undone)} weights as they were, {undone[0]} for one: with its inputs in another order "
            "the block gave another output"
        )
    return {"permuted": permuted}


def _best(
    channels: Channels, block: nn.Module, pattern: str, stats: ActivationStats
) -> tuple[Tensor | None, list[float]]:
    """(order, [share of the scores kept before, after]); None where no order is better than the present one."""
    fmt, weight = get_format(pattern), block.get_submodule(channels.consumer).weight
    scores = ria_scores(weight, stats.input_norms().to(weight.device))
    total = float(scores.sum(dtype=torch.float64))

    def kept(scores: Tensor) -> float:
        return float(scores[fmt.mask_from_scores(scores)].sum(dtype=torch.float64)) / total if total else 0.0

    order = channels.order(scores.sum(0), fmt.group)
    columns = channels.moves(order, block)[channels.consumer][1]
    before, after = kept(scores), kept(scores[:, columns])
    return (order if after > before else None), [round(before, 6), round(after, 6)]


def _apply(block: nn.Module, moves: Moves) -> None:
    for name, (rows, columns) in moves.items():
        linear = block.get_submodule(name)
        _set(linear, "weight", _arranged(linear.weight, rows, columns))
        if linear.bias is not None:
            _set(linear, "bias", _arranged(linear.bias, rows, None))


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    setattr(module, name, nn.Parameter(tensor.detach(), requires_grad=False))


def _arranged(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if rows is not None:
        tensor = tensor[rows.to(tensor.device)]
    return tensor if columns is None else tensor[:, columns.to(tensor.device)]


def _inverse(order: Tensor | None) -> Tensor | None:
    return None if order is None else order.argsort()


def _after(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """One order for two that are applied one after the other."""
    if first is None or second is None:
        return second if first is None else first
    return first[second]


def _same(before: dict[str, Tensor], after: dict[str, Tensor], consumer: str, hidden: Tensor) -> bool:
    """Whether the block and the linear that was permuted give what they gave, to rounding."""
    share, whole = TOLERANCE
    for name, base in ((consumer, None), ("", hidden)):
        reference = before[name]
        added = reference if base is None else reference - base
        if not (after[name] - reference).norm() <= share * added.norm() + whole * reference.norm():
            return False
    return True


@contextmanager
def _in_float32(block: nn.Module, outputs: dict[str, Tensor]) -> Iterator[None]:
    """While it lasts ``block`` computes in float32, with one weight widened at a time; ``outputs`` of its linears."""
    linears, narrow = ordinary_linears(block), []
    others = [module for module in block.modules() if not any(module is linear for linear in linears.values())]

    def wide(name: str, linear: nn.Linear):
        def forward(input: Tensor) -> Tensor:
            bias = None if linear.bias is None else linear.bias.float()
            outputs[name] = nn.functional.linear(input.float(), linear.weight.float(), bias)
            return outputs[name]

        return forward

    try:
        for name, linear in linears.items():
            linear.forward = wide(name, linear)
        for module in others:
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    narrow.append((module, key, parameter))
                    module._parameters[key] = nn.Parameter(parameter.float(), requires_grad=False)
        yield
    finally:
        for module, key, parameter in narrow:
            module._parameters[key] = parameter
        for linear in linears.values():
            del linear.forward


def _encoded(order: Tensor | None) -> str | None:
    return None if order is None else base64.b64encode(order.to("cpu", torch.int32).numpy().tobytes()).decode()


def _decoded(text: str | None) -> Tensor | None:
    return None if text is None else torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.int32).long()
