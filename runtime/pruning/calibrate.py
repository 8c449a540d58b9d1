"""Running a model over calibration tokens with one decoder block in memory at a time.

The protocol of the SparseGPT and Wanda code: the inputs of every linear are taken with the block still unpruned, then
the block's outputs are computed again with the pruned weights and become the inputs of the next block.

Nothing here knows a model family. The blocks are the outermost ``nn.ModuleList`` whose every member holds linear
layers. What a block is called with is found by running the model once with stand-ins for the blocks: each records its
arguments, so layers of different kinds (sliding and full attention) get the masks and rotations of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparse_rt.errors import SparseRTError, UserError
from sparse_rt.pruning.activations import Activations
from sparse_rt.pruning.calls import Calls


class Observer(Protocol):
    """What is fed with the inputs of a linear, such as ``ActivationStats``."""

    def add(self, x: Tensor) -> None: ...


class _AllBlocksReached(Exception):
    """Ends the recording run before the final norm and the head."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder blocks of ``model``; ``UserError`` when the structure is another one."""
    candidates: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for _, outer, _ in candidates)
        if inside or not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        sizes = [_linear_elements(block) for block in module]
        if all(sizes):
            candidates.append((sum(sizes), name, module))
    if not candidates:
        raise UserError(
            f"{type(model).__name__} keeps no decoder blocks in an nn.ModuleList, so it cannot be calibrated block by "
            "block; use --method magnitude or none without --reconstruct"
        )
    _, name, blocks = max(candidates, key=lambda candidate: candidate[0])
    return name, blocks


def _linear_elements(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


class BlockRunner:
    """The activations of ``model`` (built on the meta device) while its blocks pass through memory one by one.

    ``load(name)`` returns the checkpoint tensor of parameter ``name``. Order of calls: ``start(tokens)``, then for
    every block ``open``, ``advance_dense`` and ``collect`` (optional), ``set_weight`` (any number), ``advance``,
    ``close``. Between blocks the activations rest in CPU memory, or in a file in the folder ``offload``:
    [1, T, hidden] a sequence.

    ``hidden`` are those of the model with the new weights. ``follow_dense`` carries those of the unpruned model too,
    in ``dense``; ``advance_dense`` must then be called for every block while it is unpruned.
    """

    def __init__(
        self,
        model: nn.Module,
        load: Callable[[str], Tensor],
        device: torch.device | str = "cpu",
        follow_dense: bool = False,
        offload: Path | None = None,
    ):
        self.model, self.load, self.device = model.eval(), load, torch.device(device)
        self.name, self.blocks = find_blocks(model)
        self.follow_dense, self.offload = follow_dense, offload
        self.hidden = Activations(0)
        self.dense: Activations | None = None
        self._calls = Calls()
        _make_buffers(model, self.device)

    def block_name(self, index: int) -> str:
        return f"{self.name}.{index}"

    @torch.no_grad()
    def start(self, tokens: Tensor) -> None:
        """Embed ``tokens`` int64 [k, T] and record how every block is called for each of the k sequences."""
        hooks = self._load_on_use()
        self.hidden = Activations(len(tokens), self.offload)
        try:
            for number, sequence in enumerate(tokens):
                self._record(number, sequence.unsqueeze(0).to(self.device))
            if self.follow_dense:
                self.dense = self.hidden.copy()
        finally:
            for hook in hooks:
                hook.remove()
            for name, module in self.model.named_modules():
                if not self._is_inside(name):
                    _drop(module)

    @torch.no_grad()
    def open(self, index: int) -> nn.Module:
        """Bring block ``index`` into memory, unpruned."""
        block, prefix = self.blocks[index], self.block_name(index)
        for name, module in block.named_modules():
            _fill(module, f"{prefix}.{name}" if name else prefix, self.load, self.device)
        return block

    @torch.no_grad()
    def collect(
        self,
        index: int,
        observers: Mapping[str, Observer],
        advance: bool = False,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        """Feed the inputs of the linears named in ``observers`` (names inside the block), one sequence at a time.

        ``begin`` is called before each. ``advance`` keeps the outputs as the method of that name does, which spares a
        second run.
        """
        modules = dict(self.blocks[index].named_modules())

        def hook_of(observer: Observer):
            return lambda module, args, kwargs: observer.add(args[0] if args else kwargs["input"])

        hooks = [
            modules[name].register_forward_pre_hook(hook_of(observer), with_kwargs=True)
            for name, observer in observers.items()
        ]
        try:
            for sequence, hidden in enumerate(self.hidden):
                begin()
                output = self._run(index, sequence, hidden)
                if advance:
                    self.hidden[sequence] = output
        finally:
            for hook in hooks:
                hook.remove()

    def set_weight(self, index: int, name: str, weight: Tensor) -> None:
        """Replace the weight of linear ``name`` of block ``index``."""
        linear = self.blocks[index].get_submodule(name)
        linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=False)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Turn the activations into the outputs of block ``index``."""
        for sequence, hidden in enumerate(self.hidden):
            self.hidden[sequence] = self._run(index, sequence, hidden)

    @torch.no_grad()
    def advance_dense(self, index: int) -> None:
        """Turn the activations of the unpruned model into the outputs of block ``index``, which is unpruned still."""
        for sequence, hidden in enumerate(self.dense):
            self.dense[sequence] = self._run(index, sequence, hidden)

    @torch.no_grad()
    def error(self, index: int) -> float:
        """||f(hidden) - dense|| / ||dense|| (Frobenius norms over all sequences) with the weights that are in place."""
        difference = total = 0.0
        for sequence, (hidden, dense) in enumerate(zip(self.hidden, self.dense, strict=True)):
            dense = dense.to(self.device, torch.float32)
            output = self._run(index, sequence, hidden).float()
            difference += float((output - dense).square().sum(dtype=torch.float64))
            total += float(dense.square().sum(dtype=torch.float64))
        return (difference / max(total, torch.finfo(torch.float64).tiny)) ** 0.5

    def call(self, index: int, sequence: int) -> tuple[tuple, dict[str, Any]]:
        """What block ``index`` is called with besides the activations: (args, kwargs)."""
        return self._calls.of(sequence, index)

    def close(self, index: int) -> None:
        """Forget the weights of block ``index``."""
        for module in self.blocks[index].modules():
            _drop(module)

    def _run(self, index: int, sequence: int, hidden: Tensor) -> Tensor:
        args, kwargs = self.call(index, sequence)
        output = self.blocks[index](hidden.to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _is_inside(self, name: str) -> bool:
        return name == self.name or name.startswith(f"{self.name}.")

    def _load_on_use(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Modules around the blocks get their weights when they first run: embeddings yes, the head never.

        Embeddings already when the module around them runs, which may read their table itself (DeBERTa).
        """

        def hook_of(name: str):
            def fill(module: nn.Module, args: tuple) -> None:
                _fill(module, name, self.load, self.device)
                for own, child in module.named_children():
                    if isinstance(child, nn.Embedding):
                        _fill(child, f"{name}.{own}" if name else own, self.load, self.device)

            return fill

        return [
            module.register_forward_pre_hook(hook_of(name))
            for name, module in self.model.named_modules()
            if not self._is_inside(name)
        ]

    def _record(self, sequence: int, ids: Tensor) -> None:
        reached = 0

        def stand_in(index: int):
            def forward(*args, **kwargs):
                nonlocal reached
                if index != reached:
                    raise UserError(
                        f"{type(self.model).__name__} does not run its {len(self.blocks)} blocks once and in order, so "
                        "it cannot be calibrated block by block; use --method magnitude or none without --reconstruct"
                    )
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if index == 0:
                    self.hidden[sequence] = hidden
                self._calls.add(args[1:], kwargs)
                reached += 1
                if reached == len(self.blocks):
                    raise _AllBlocksReached
                # Some models take a block's output as it is, some its first element, some two: a pair suits all, for
                # the next stand-in only hands it on.
                return hidden, None

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = stand_in(index)
        self._calls.begin()
        try:
            self.model(input_ids=ids, use_cache=False)
        except _AllBlocksReached:
            pass
        finally:
            self._calls.end()
            for block in self.blocks:
                del block.forward
        if reached != len(self.blocks):
            raise SparseRTError(f"{type(self.model).__name__} ran only {reached} of its {len(self.blocks)} blocks")


def _fill(module: nn.Module, name: str, load: Callable[[str], Tensor], device: torch.device) -> None:
    """Give ``module`` itself (not its children) its parameters and persistent buffers, where they are on meta."""
    prefix = f"{name}." if name else ""
    for key, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            tensor = load(prefix + key).to(device=device, dtype=parameter.dtype)
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    for key, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta and key not in module._non_persistent_buffers_set:
            module._buffers[key] = load(prefix + key).to(device=device, dtype=buffer.dtype)


def _drop(module: nn.Module) -> None:
    """The reverse of ``_fill``."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            module._buffers[key] = buffer.to("meta")


def _make_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores (rotary frequencies, embedding scales) on ``device``.

    transformers recomputes them in ``_init_weights`` when it loads a model built on meta; the same road is taken here.
    Parameters are still on meta, so initialising them costs nothing.
    """
    for name, module in model.named_modules():
        keys = [key for key in module._non_persistent_buffers_set if module._buffers.get(key) is not None]
        keys = [key for key in keys if module._buffers[key].is_meta]
        if not keys:
            continue
        for key in keys:
            empty = torch.empty_like(module._buffers[key], device=device)
            module._buffers[key] = empty.fill_(float("nan")) if empty.is_floating_point() else empty.fill_(-1)
        with torch.no_grad():
            model._init_weights(module)
        for key in keys:
            buffer = module._buffers[key]
            if bool((buffer.isnan() if buffer.is_floating_point() else buffer == -1).any()):
                raise UserError(
                    f"transformers does not say how to compute buffer {name}.{key} without loading the whole model; "
                    "use --method magnitude or none without --reconstruct"
                )
