"""What a conversion will take at its worst moment, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sparse_rt.conversion.plan import Decision, Plan
from sparse_rt.formats.selection import PIECE
from sparse_rt.pruning.statistics import SAMPLE_ROWS

# Small objects, and pages of the heap that hold little of what is in use: more after tensors of every size have passed
# through a block. From measurements on models 768 to 2048 wide.
HEAP_BYTES, HEAP_BYTES_RUNNING = 1_000_000, 15_000_000


def peak_memory(plan: Plan, tokens: int) -> dict[str, int]:
    """Bytes of the parts that are there together; ``tokens`` of one calibration sequence.

    "work" is a tensor while it is copied or, where that is more, pruned and packed, or what one calibration sequence
    takes on its way through a block. A calibrated conversion holds the "block" that is open, the "activations" between
    blocks and the "statistics" of the block's inputs too; ``--reconstruct`` the "reconstruction". On a GPU, block,
    statistics and work lie there. What is done waits for its shard in a file, and is not here.
    """
    if not plan.runs_model:
        return {"work": max((_alone(plan, key) for key in plan.outside), default=0) + HEAP_BYTES}
    compressed = [d for d in plan.decisions.values() if d.pattern]
    itemsize = max((plan.source.tensors[d.key].dtype.itemsize for d in compressed), default=2)
    sizes = [sum(plan.source.tensors[key].numel for key in keys) for keys in plan.blocks]
    embedding = max((plan.source.tensors[key].numel for key in plan.outside), default=0)
    width = min((d.shape[1] for d in compressed), default=0)
    sequences = 2 if plan.options.offload_activations else plan.options.num_samples
    activations = sequences * tokens * width * itemsize
    blocks = range(len(plan.blocks))
    moments = (moment for index in blocks for moment in _moments(plan, plan.pruned_in(index), tokens))
    statistics, work = max(moments, key=sum, default=(0, 0))
    parts = {"block": max([embedding, *sizes]) * itemsize, "activations": activations}
    parts |= {"statistics": statistics, "work": work + HEAP_BYTES_RUNNING}
    if plan.options.reconstruct:
        parts["reconstruction"] = activations + max(_training(plan, tokens), default=0)
    return parts


def _alone(plan: Plan, key: str) -> int:
    """A tensor that is copied, in another dtype perhaps, or a weight that is pruned without the model."""
    decision = plan.decisions.get(key)
    if decision is not None and decision.pattern:
        return _pruning(plan, decision)
    tensor, stored = plan.source.tensors[key], plan.stored_dtype(plan.source.tensors[key])
    return tensor.numel * (tensor.dtype.itemsize + (stored.itemsize if stored != tensor.dtype else 0))


def _moments(plan: Plan, pruned: list[Decision], tokens: int) -> Iterator[tuple[int, int]]:
    """(statistics, work) of one block: for every weight that is pruned, and before, while sequences run through it.

    Statistics are sampled rows and, if the pruner needs it, X^T X in float32. Linears with one input share theirs.
    Which do shows when the model runs; of those in one module with inputs of one width, all but one are taken to
    (query, key and value, but not the output; gate and up). The widest are pruned last, and what was pruned needs none
    any more.
    """
    gram, groups, left = int(plan.pruner.needs_gram), Counter(), 0
    for decision in sorted(pruned, key=lambda d: d.shape[1], reverse=True):
        n = decision.shape[1]
        group = decision.name.rpartition(".")[0], n
        groups[group] += 1
        if groups[group] <= 2:
            left += 4 * n * (SAMPLE_ROWS + gram * n)
        yield left, _pruning(plan, decision)
    yield left, 4 * tokens * max((d.shape[1] for d in pruned), default=0) * 4


def _pruning(plan: Plan, decision: Decision) -> int:
    """One weight as it was read, and choosing its mask or, where that is more, packing it and measuring the error.

    Packing holds the mask, the kept values and the dense weight that takes the place of the unpruned one; measuring
    the outputs of the sampled inputs for a piece of the rows, and these rows in float32.
    """
    m, n = decision.shape
    numel, size = m * n, plan.source.tensors[decision.key].dtype.itemsize
    packing = numel + decision.stored_bytes(plan.sparsity) + decision.dense_bytes
    if plan.pruner.needs_calibration:
        packing += 4 * SAMPLE_ROWS * (n + 2 * min(m, max(1, PIECE // n))) + 8 * min(numel, PIECE)
    return numel * size + max(plan.pruner.workspace(m, n), packing)


def _training(plan: Plan, tokens: int) -> Iterator[int]:
    """Bytes that ``--reconstruct`` takes in each block, the activations of the dense model excepted.

    Four float32 numbers a kept weight (value, gradient, state) and, for the backward pass, the inputs and outputs of
    every linear for one sequence, about twice.
    """
    for keys in plan.blocks:
        pruned = [d for key in keys if (d := plan.decisions.get(key)) and d.pattern]
        yield sum(16 * d.nnz + 8 * tokens * sum(d.shape) + d.stored_bytes(plan.sparsity) for d in pruned)
