"""Carrying out a plan: prune, compress and write tensor by tensor; decoder block by decoder block when calibrated."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_rt.checkpoint import CheckpointWriter
from sparse_rt.conversion import experts
from sparse_rt.conversion.crew import Crew
from sparse_rt.conversion.detect import AUTO, MAX_DENSITY, Detected, detect
from sparse_rt.conversion.memory import release
from sparse_rt.conversion.permute import Permuting
from sparse_rt.conversion.plan import Decision, Plan
from sparse_rt.errors import FormatError, SparseRTError, UserError
from sparse_rt.formats import all_finite, check_finite, get_format, normalize_zeros
from sparse_rt.formats.wrapper import NAMES, Wrapper
from sparse_rt.kernels import ops
from sparse_rt.progress import Progress
from sparse_rt.pruning import ActivationStats, BlockRunner, Compressed, Pruned, Schedule, SharedStats, reconstruct
from sparse_rt.pruning.transposable import TransposableFormat

FACTS_NAME = ".facts.jsonl"  # hidden: the manifest does not list it, it goes when everything else is in place


class Facts:
    """What was found out about each weight, one JSON line each, so that a resumed run reports what it did not redo."""

    def __init__(self, folder: Path, resume: bool):
        self.path = folder / FACTS_NAME
        self.known: dict[str, dict[str, Any]] = {}
        if not resume:
            self.path.unlink(missing_ok=True)
        elif self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    fact = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that was being written when the process died
                self.known[fact.pop("name")] = fact
            self._rewrite()

    def _rewrite(self) -> None:
        lines = [json.dumps({"name": name, **fact}) + "\n" for name, fact in self.known.items()]
        self.path.write_text("".join(lines))

    def add(self, name: str, **fact: Any) -> None:
        self.known[name] = fact
        with self.path.open("a") as file:
            file.write(json.dumps({"name": name, **fact}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class Writing:
    """One weight at a time from the source, through the pruner, into the writer."""

    def __init__(
        self, plan: Plan, writer: CheckpointWriter, device: torch.device, resume: bool, crew: Crew | None = None
    ):
        self.plan, self.writer, self.device, self.crew = plan, writer, device, crew or Crew()
        self.done = writer.done
        self.facts = Facts(writer.folder, resume)
        self.permuting = Permuting(plan, self.facts, self.done) if plan.options.permute else None
        if any(d.pattern and d.name in self.done and d.name not in self.facts.known for d in plan.decisions.values()):
            raise UserError("cannot resume: the notes of the unfinished conversion are damaged; start over")
        for name, fact in self.facts.known.items():
            decision = plan.decisions.get(f"{name}.weight")
            if decision is not None and "reason" in fact:
                decision.pattern, decision.reason = None, fact["reason"]
            elif decision is not None and "detected" in fact:
                decision.detected = Detected(**fact["detected"])
                decision.pattern = decision.detected.pattern

    def tensor(self, key: str) -> None:
        """Copy ``key`` as it is (in the stored dtype), or compress it when it is a weight that needs no calibration."""
        decision = self.plan.decisions.get(key)
        if key in self.done or (decision and decision.name in self.done):
            return
        if decision is None or decision.pattern is None:
            self._copy(key, self._load(key))
            return
        weight = self.read(decision)
        if decision.pattern == AUTO:
            self._detect(decision, weight)
        compressed = self.compress(decision, weight, stats=None) if decision.pattern else None
        if compressed is None:
            self._copy(key, weight)
        else:
            self.note(decision, compressed)
            self.store(decision, compressed)
        del weight, compressed
        release()

    def _detect(self, decision: Decision, weight: Tensor) -> None:
        """Give ``decision`` the pattern that the zeros of ``weight`` obey, or the reason to stay dense."""
        stored = self.plan.source.stored_mask(decision.key)
        found = decision.detected = detect(weight != 0 if stored is None else stored)
        decision.pattern, decision.reason, decision.nnz = found.pattern, found.reason, found.nnz
        if found.pattern is None:
            self.facts.add(decision.name, reason=found.reason)

    def read(self, decision: Decision) -> Tensor:
        """The dense weight of ``decision``; ``FormatError`` for NaN or Inf, -0.0 made +0.0."""
        weight = self._load(decision.key)
        check_finite(decision.key, weight)
        return normalize_zeros(weight)

    def _load(self, key: str) -> Tensor:
        tensor = self.plan.source.load(key)
        return tensor if self.permuting is None else self.permuting.arranged(key, tensor)

    def compress(self, decision: Decision, weight: Tensor, stats: ActivationStats | None) -> Compressed | None:
        """Prune ``weight``, in the stored dtype; None when it stays dense."""
        plan, fmt, (m, n) = self.plan, get_format(decision.pattern), decision.shape
        new, mask, wrapper = self._prune(decision, weight, stats)
        nnz = int(mask.count_nonzero())
        if plan.options.method == "none" and fmt.default_sparsity is None and nnz > MAX_DENSITY * mask.numel():
            decision.pattern = None
            density = nnz / mask.numel()
            decision.reason = f"density {density:.4f} is above {MAX_DENSITY}: compressing saves next to nothing"
            self.facts.add(decision.name, reason=decision.reason)
            return None
        if wrapper is not None:
            wrapper = Wrapper(*(cast(decision.key, matrix, decision.dtype) for matrix in wrapper))
        metadata = fmt.pack_mask(mask)
        values = ops.gather(new, metadata, decision.pattern, m, n, new.new_empty(fmt.values_shape(m, n, nnz)))
        return Compressed(decision.pattern, cast(decision.key, values, decision.dtype), metadata, wrapper)

    def note(self, decision: Decision, weight: Compressed, error: float | None = None) -> None:
        """Write down what was found and reached: the share of zeros and, if calibrated, the reconstruction error."""
        fact = {"sparsity": round(1 - weight.values.numel() / torch.Size(decision.shape).numel(), 6)}
        if decision.detected:
            fact["detected"] = asdict(decision.detected)
        if error is not None:
            fact["reconstruction_error"] = round(error, 6)
        elif self.plan.pruner.needs_calibration:
            fact["unseen"] = True
        self.facts.add(decision.name, **fact)

    def _prune(self, decision: Decision, weight: Tensor, stats: ActivationStats | None) -> Pruned:
        plan, fmt = self.plan, self.plan.format_of(decision)
        try:
            if plan.options.method == "none":
                mask = self._stored_mask(decision, fmt)
                if mask is not None:
                    return Pruned(weight, mask)
            if stats is None and plan.pruner.needs_calibration:
                pruned = experts.prune_unseen(plan.pruner, weight.to(self.device), fmt, decision.sparsity)
            else:
                pruned = Pruned(*plan.pruner.prune(weight.to(self.device), stats, fmt, decision.sparsity))
        except FormatError as error:
            raise FormatError(
                f"{decision.key} does not obey the pattern {fmt.pattern}: {error} (--method magnitude does), give it "
                f"another pattern (--overrides {decision.name}=unstructured) or leave it dense (--ignore)"
            ) from error
        if isinstance(fmt, TransposableFormat) and not fmt.allows(pruned.mask):
            raise SparseRTError(
                f"{plan.options.method} left a mask for {decision.key} that is not transposable; use another --method"
            )
        return pruned

    def _stored_mask(self, decision: Decision, fmt) -> Tensor | None:
        """The mask that the source stores, when it is legal as it is: explicit zeros then stay kept."""
        mask = self.plan.source.stored_mask(decision.key)
        if mask is None or fmt.group is None:
            return mask
        legal = fmt.mask_from_scores(mask.to(torch.float32))
        return mask if torch.equal(legal, mask) else None

    def store(self, decision: Decision, weight: Compressed) -> None:
        stored = weight.values, weight.metadata
        self.writer.add_weight(decision.name, decision.pattern, *decision.shape, *stored, wrapper=weight.wrapper)

    def _copy(self, key: str, tensor: Tensor) -> None:
        if key.endswith((".weight", ".bias")):
            check_finite(key, tensor)
        dtype = self.plan.stored_dtype(self.plan.source.tensors[key])
        self.writer.add(key, tensor if dtype == tensor.dtype else cast(key, tensor, dtype))


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype`` without -0.0; ``FormatError`` when a value overflows. Underflow to 0 is fine: the mask
    was chosen before."""
    if tensor.dtype == dtype:
        return normalize_zeros(tensor)
    result = normalize_zeros(tensor.to(dtype))
    if not all_finite(result):
        largest = float(tensor.abs().max())
        raise FormatError(f"{name}: {largest:g} does not fit into {dtype}; use --dtype bfloat16 or float32")
    return result


def write_weights(writing: Writing, runner: BlockRunner | None, tokens: Tensor | None, progress: Progress) -> None:
    """Write every tensor of the plan, those already ``done`` excepted; ``runner`` and ``tokens`` for calibration."""
    plan = writing.plan
    with writing.crew.together():
        for key in plan.outside if runner else progress.track(plan.outside, "compressing", total=len(plan.outside)):
            writing.tensor(key)
    if runner is None:
        return
    if writing.crew.share(all(d.name in writing.done for d in plan.decisions.values() if d.pattern)):
        for key in (key for keys in plan.blocks for key in keys):
            writing.tensor(key)
        return
    progress.stage(f"embedding {len(tokens)} calibration sequences of {tokens.shape[1]} tokens")
    with writing.crew.together():
        runner.start(writing.crew.part(tokens))
    if writing.permuting is not None:
        writing.permuting.start(runner, tokens)
    for index in progress.track(
        range(len(plan.blocks)), f"{plan.options.method}, block by block", total=len(plan.blocks)
    ):
        _write_block(writing, runner, index, len(tokens))


def follow(plan: Plan, runner: BlockRunner | None, tokens: Tensor | None, crew: Crew) -> None:
    """``write_weights`` of a process that does not write: run the blocks, add to the statistics, take the weights."""
    with crew.together():  # the first process copies what is outside of the blocks
        pass
    if runner is None or crew.share(None):
        return
    with crew.together():
        runner.start(crew.part(tokens))
    for index in range(len(plan.blocks)):
        last, finished = index + 1 == len(plan.blocks), crew.share(None)
        if not finished:
            _statistics(plan, runner, index, len(tokens), crew)
        with crew.together():  # the first process prunes
            if finished and not last:
                runner.open(index)
        if not last:
            _hand_on(plan, runner, index, crew)
        runner.close(index)
        with crew.together():  # the first process writes the rest of the block
            release()


def _write_block(writing: Writing, runner: BlockRunner, index: int, sequences: int) -> None:
    """Prune and write one block; a block that an earlier run finished is read back instead."""
    plan, crew = writing.plan, writing.crew
    decisions = plan.pruned_in(index)
    last = index + 1 == len(plan.blocks)
    finished = crew.share(all(d.name in writing.done for d in decisions))
    compressed: dict[str, Compressed] = {}
    stats = None if finished else _statistics(plan, runner, index, sequences, crew)
    with crew.together():
        if finished and not last:
            runner.open(index)
            if plan.options.reconstruct:
                runner.advance_dense(index)
            if writing.permuting is not None:
                writing.permuting.restore(runner, index)
            for decision in decisions:
                runner.set_weight(index, plan.inner_name(index, decision), read_back(writing.writer, decision))
        elif not finished:
            compressed = _prune_open_block(writing, runner, index, stats)
    if not last:
        _hand_on(plan, runner, index, crew)
    runner.close(index)
    with crew.together():
        for key in plan.blocks[index]:
            decision = plan.decisions.get(key)
            if decision is None or not decision.pattern:
                writing.tensor(key)
            elif decision.name in compressed and decision.name not in writing.done:
                writing.store(decision, compressed.pop(decision.name))
        release()


def _statistics(plan: Plan, runner: BlockRunner, index: int, sequences: int, crew: Crew) -> SharedStats:
    """Open a block and collect the statistics of its inputs over the ``sequences`` of all processes."""
    width = {plan.inner_name(index, d): d.shape[1] for d in plan.pruned_in(index)}
    wanted = plan.pruner.needs_gram, sequences, plan.pruner.needs_moments
    stats = SharedStats(list(width), lambda name: ActivationStats(width[name], runner.device, *wanted))
    with crew.together():
        runner.open(index)
        if plan.options.reconstruct:
            runner.advance_dense(index)
        runner.collect(index, stats.observers, begin=stats.begin)
        stats.finish()
        release()
    crew.reduce(stats)
    return stats


def _hand_on(plan: Plan, runner: BlockRunner, index: int, crew: Crew) -> None:
    """Give all processes the pruned weights of the open block, and turn the activations into its outputs."""
    if crew.size > 1:
        for decision in plan.pruned_in(index):
            name = plan.inner_name(index, decision)
            weight = runner.blocks[index].get_submodule(name).weight.detach()
            runner.set_weight(index, name, crew.hand_on(weight))
    with crew.together():
        runner.advance(index)


def _prune_open_block(writing: Writing, runner: BlockRunner, index: int, stats: SharedStats) -> dict[str, Compressed]:
    """Every linear pruned and put in place; name -> weight of those that are not stored yet."""
    plan, compressed = writing.plan, {}
    # Those with the widest inputs come last: of the second moments only theirs, the largest, are there then.
    widest_last = sorted(plan.pruned_in(index), key=lambda d: d.shape[1])
    decisions = {plan.inner_name(index, d): d for d in widest_last}
    if writing.permuting is not None:
        writing.permuting.choose(runner, index, decisions, stats)
    for inner, decision in decisions.items():
        seen = stats.pop(inner)
        if seen is not None and seen.tokens:
            seen.check_finite(decision.name)
        elif plan.pruner.needs_calibration and not experts.is_expert(decision.name):
            raise UserError(f"{decision.name} was not used by any calibration sequence; leave it dense with --ignore")
        else:
            seen = None
        weight = _prune_in_place(writing, runner, index, decision, seen)
        if plan.options.reconstruct:
            compressed[decision.name] = weight
        elif decision.name not in writing.done:
            writing.store(decision, weight)
        del seen, weight
        release()
    if plan.options.reconstruct and compressed:
        compressed = _reconstruct(writing, runner, index, list(decisions.values()), compressed)
    return compressed


def _prune_in_place(
    writing: Writing, runner: BlockRunner, index: int, decision: Decision, seen: ActivationStats | None
) -> Compressed:
    """The pruned weight of ``decision``, which the open block has from now on."""
    before = writing.read(decision)
    weight = writing.compress(decision, before, seen)
    after = weight.dense(*decision.shape)
    error = None if seen is None else seen.reconstruction_error(before.to(after.device), after)
    writing.note(decision, weight, error)
    runner.set_weight(index, writing.plan.inner_name(index, decision), after)
    return weight.to("cpu")


def _reconstruct(
    writing: Writing,
    runner: BlockRunner,
    index: int,
    decisions: list[Decision],
    pruned: dict[str, Compressed],
) -> dict[str, Compressed]:
    """``pruned`` with trained values where they bring the block's output closer to the dense one's, else as it was."""
    plan, before = writing.plan, runner.error(index)
    inner = {decision.name: plan.inner_name(index, decision) for decision in decisions}
    weights = {inner[d.name]: pruned[d.name] for d in decisions}
    options = plan.options
    schedule = Schedule(options.reconstruct, options.reconstruct_learning_rate, options.seed)
    trained = reconstruct(runner, index, weights, schedule)
    values = {d.name: normalize_zeros(trained[inner[d.name]].cpu().to(d.dtype)) for d in decisions}
    found = {name: replace(weight, values=values[name]) for name, weight in pruned.items()}

    def put(weights: dict[str, Compressed]) -> None:
        for d in decisions:
            runner.set_weight(index, inner[d.name], weights[d.name].dense(*d.shape))

    put(found)
    after = runner.error(index)
    if not after < before or not all(all_finite(tensor) for tensor in values.values()):
        put(pruned)
        found, after = pruned, before
    writing.facts.add(runner.block_name(index), block_error={"before": round(before, 6), "after": round(after, 6)})
    return found


def read_back(writer: CheckpointWriter, decision: Decision) -> Tensor:
    """The pruned dense weight of a finished shard."""
    names = get_format(decision.pattern).tensor_names
    with safe_open(writer.part_file(decision.name), framework="pt") as file:
        tensors = [file.get_tensor(f"{decision.name}.{suffix}") for suffix in names]
        matrices = [file.get_tensor(f"{decision.name}.{suffix}") for suffix in NAMES if decision.blocks]
    return Compressed(decision.pattern, *tensors, Wrapper(*matrices) if matrices else None).dense(*decision.shape)
