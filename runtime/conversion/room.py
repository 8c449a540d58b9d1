"""The room on the disk that a conversion needs, asked for before the work."""

from __future__ import annotations

import shutil
from pathlib import Path

from sparse_rt.checkpoint import partial_path
from sparse_rt.config import parse_size
from sparse_rt.conversion.plan import Plan
from sparse_rt.errors import UserError
from sparse_rt.report import size


def disk_bytes(plan: Plan, assumed_sparsity: float) -> int:
    """The most bytes that are on the disk at once: the output, and the tensors of one shard twice while it is written.

    Where the zeros of the model decide how much is kept, ``assumed_sparsity`` stands in. Activations that are offloaded
    ask for their room themselves.
    """
    output = plan.compressed_bytes(assumed_sparsity)
    largest = max(plan.stored_sizes(assumed_sparsity), default=0)  # a shard holds one tensor at least
    return output + min(output, max(largest, parse_size(plan.options.max_shard_size)))


def refuse_full_disk(plan: Plan, output: Path) -> None:
    """``UserError`` when the disk of ``output`` has no room for it, however sparse the weights turn out to be.

    What an unfinished conversion to ``output`` left there is a part of it, or is thrown away.
    """
    needed = disk_bytes(plan, assumed_sparsity=1.0)
    existing = next(parent for parent in output.absolute().parents if parent.is_dir())
    partial = partial_path(output)
    left = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0
    usage = shutil.disk_usage(existing)
    free = usage.free + left
    if needed > free and usage.total:  # some network and user-space file systems say 0 of 0
        raise UserError(
            f"the conversion needs {size(needed)} on the disk of {output}, for the result and, once more, the shard "
            f"that is being written; {size(free)} are free there: make room, choose another --output-dir, or lower "
            "--max-shard-size"
        )
