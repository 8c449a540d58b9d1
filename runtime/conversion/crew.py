"""The processes of one conversion: each runs its part of the calibration sequences, the first one prunes and writes.

Started by ``accelerate launch`` or torchrun, through accelerate's process state. Every process opens every block. The
statistics of a block's inputs are added up over the processes, the first one prunes by the sums and hands the pruned
weights to the others, so that all go on with the same block.

Processes meet in ``together``: what went wrong in one ends all of them there, with the same exit code, instead of
leaving the others waiting for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparse_rt.errors import SparseRTError, UserError
from sparse_rt.optional import require
from sparse_rt.pruning import ActivationStats, SharedStats


class Crew:
    """One process alone: nothing is exchanged."""

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this process prunes and writes."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Where this process works, when the user asked for ``device``."""
        return device

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error in the body, in any process, ends all."""
        yield

    def share(self, value: Any) -> Any:
        """What the first process passes."""
        return value

    def part(self, tokens: Tensor) -> Tensor:
        """The calibration sequences of this process."""
        return tokens

    def reduce(self, stats: SharedStats) -> None:
        """Make the statistics of the first process those of all sequences."""

    def hand_on(self, weight: Tensor) -> Tensor:
        """``weight`` of the first process, in all; the others pass one of the same shape and dtype to be filled."""
        return weight

    def leave(self) -> None:
        """The work is done."""


class Several(Crew):
    """One of ``size`` processes."""

    def __init__(self, state: Any, own_group: bool):
        self.rank, self.size, self._state = state.process_index, state.num_processes, state
        self._own_group = own_group

    def device(self, device: torch.device) -> torch.device:
        return self._state.device if device.type != "cpu" else device

    @contextmanager
    def together(self) -> Iterator[None]:
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        failures = self._all(own and (isinstance(own, UserError), str(own) or type(own).__name__))
        if own is not None:
            raise own
        for rank, failure in enumerate(failures):
            if failure:
                bad_input, message = failure
                raise (UserError if bad_input else SparseRTError)(f"process {rank} of {self.size}: {message}")

    def share(self, value: Any) -> Any:
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]

    def part(self, tokens: Tensor) -> Tensor:
        return tokens[self.rank :: self.size]

    def reduce(self, stats: SharedStats) -> None:
        """A linear that this process never called has zeros to add; the sampled inputs go to the first process."""
        found = self._all(stats.groups())
        joined: dict[str, list[str]] = {}
        for group in (group for groups in found for group in groups):
            names = next((joined[name] for name in group if name in joined), [])
            names += [name for name in group if name not in names]
            joined |= dict.fromkeys(group, names)
        for names in {id(names): names for names in joined.values()}.values():
            if any(sum(not set(names).isdisjoint(group) for group in groups) > 1 for groups in found):
                raise SparseRTError(
                    f"{', '.join(names)} were called with one input in one process and with several in another; leave "
                    "one of them dense with --ignore, or convert in one process"
                )
            self._add_up(stats.join(names))

    def _add_up(self, stats: ActivationStats) -> None:
        for tensor in stats.sums():
            torch.distributed.all_reduce(tensor)
        counts = self._all((stats.sequences, stats.tokens))
        samples = [None] * self.size if self.leads else None
        torch.distributed.gather_object(stats.sample().to("cpu", copy=True), samples, dst=0)
        stats.take_over(*map(sum, zip(*counts, strict=True)), samples or [])

    def hand_on(self, weight: Tensor) -> Tensor:
        raw = weight.contiguous().view(torch.uint8)  # gloo does not know every dtype
        torch.distributed.broadcast(raw, src=0)
        return raw.view(weight.dtype)

    def leave(self) -> None:
        if self._own_group:
            self._state.destroy_process_group()

    def _all(self, value: Any) -> list[Any]:
        found = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found


def join(device: torch.device) -> Crew:
    """The processes that a launcher started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Crew()
    own_group = not torch.distributed.is_initialized()
    return Several(require("accelerate", "train").PartialState(cpu=device.type == "cpu"), own_group)


def refuse_alone(crew: Crew, chosen: dict[str, bool]) -> None:
    """``UserError`` for options (name -> used) that several processes cannot share."""
    used = [name for name, given in chosen.items() if given]
    if crew.size > 1 and used:
        raise UserError(
            f"{', '.join(used)} works in one process, and {crew.size} were launched; start sparse-rt without a "
            "launcher, or leave it out"
        )
