"""What a conversion will take at its worst moment, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sparse_rt.config import parse_size
from sparse_rt.conversion.plan import Decision, Plan
from sparse_rt.formats.selection import PIECE
from sparse_rt.pruning.statistics import SAMPLE_ROWS

# Pages of the heap that hold little of what is in use, and small objects; measured on models of several sizes.
HEAP_BYTES = 6_000_000


def peak_memory(plan: Plan, tokens: int) -> dict[str, int]:
    """Bytes of the parts that are there together; ``tokens`` of one calibration sequence.

    "shard" waits to be written, "work" is one weight while it is pruned and packed or, where that is more, what one
    calibration sequence takes on its way through a block. A calibrated conversion holds the "block" that is open, the
    "activations" between blocks and the "statistics" of the block's inputs too; ``--reconstruct`` the "reconstruction".
    On a GPU, block, statistics and work lie there.
    """
    compressed = [d for d in plan.decisions.values() if d.pattern]
    largest = max(tensor.numel * plan.stored_dtype(tensor).itemsize for tensor in plan.source.tensors.values())
    limit = max(parse_size(plan.options.max_shard_size), largest if _stays_dense(plan, largest) else 0)
    parts = {"shard": min(limit, plan.totals()["compressed_bytes"])}
    work = max((_pruning(plan, d) for d in compressed), default=0)
    if plan.runs_model:
        itemsize = max((plan.source.tensors[d.key].dtype.itemsize for d in compressed), default=2)
        blocks = [[d for key in keys if (d := plan.decisions.get(key))] for keys in plan.blocks]
        sizes = [sum(plan.source.tensors[key].numel for key in keys) for keys in plan.blocks]
        embedding = max((plan.source.tensors[key].numel for key in plan.outside), default=0)
        widths = [d.shape[1] for block in blocks for d in block] or [0]
        sequences = 2 if plan.options.offload_activations else plan.options.num_samples
        parts |= {
            "block": max([embedding, *sizes]) * itemsize,
            "activations": sequences * tokens * min(widths) * itemsize,
            "statistics": max((_statistics(plan, block) for block in blocks), default=0),
        }
        work = max(work, 4 * tokens * max(widths) * 4)
    parts["work"] = work + HEAP_BYTES
    if plan.options.reconstruct:
        parts["reconstruction"] = parts["activations"] + max(_training(plan, tokens), default=0)
    return parts


def _stays_dense(plan: Plan, nbytes: int) -> bool:
    """Whether the largest tensor is copied as it is: it may be larger than a shard, and is one of its own then."""
    return any(
        tensor.numel * plan.stored_dtype(tensor).itemsize == nbytes
        for key, tensor in plan.source.tensors.items()
        if key not in plan.decisions or plan.decisions[key].pattern is None
    )


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


def _statistics(plan: Plan, block: list[Decision]) -> int:
    """Of the inputs of one block: sampled rows and, if the pruner needs it, X^T X in float32.

    Linears with one input share theirs. Which do shows when the model runs; of those in one module with inputs of one
    width, all but one are taken to (query, key and value, but not the output; gate and up).
    """
    groups = Counter((d.name.rpartition(".")[0], d.shape[1]) for d in block if d.pattern)
    gram = 1 if plan.pruner.needs_gram else 0
    return sum(4 * n * (SAMPLE_ROWS + gram * n) * min(count, 2) for (_, n), count in groups.items())


def _training(plan: Plan, tokens: int) -> Iterator[int]:
    """Bytes that ``--reconstruct`` takes in each block, the activations of the dense model excepted.

    Four float32 numbers a kept weight (value, gradient, state) and, for the backward pass, the inputs and outputs of
    every linear for one sequence, about twice.
    """
    for keys in plan.blocks:
        pruned = [d for key in keys if (d := plan.decisions.get(key)) and d.pattern]
        yield sum(16 * d.nnz + 8 * tokens * sum(d.shape) + d.stored_bytes(plan.sparsity) for d in pruned)
