"""How long a conversion will take on this machine, from short trials: a block, slices of weights, the disk.

Nothing of the model is read but the first bytes of a file. Where a trial at the real size would take too long, it is
made smaller and scaled by what it computes.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparse_rt.conversion.detect import AUTO
from sparse_rt.conversion.memory import release
from sparse_rt.conversion.plan import Plan
from sparse_rt.formats import Format, check_finite, get_format, normalize_zeros
from sparse_rt.kernels import ops
from sparse_rt.pruning import ActivationStats, BlockRunner, Compressed, ratios
from sparse_rt.pruning.base import Pruned

# A trial of a block multiplies about this often: a second or so on a core. One of a weight has as many columns at most,
# and these numbers of elements: enough not to stay in a cache, and to come from the system as whole weights do.
BLOCK_PRODUCTS, COLUMNS = 5e10, 2048
ELEMENTS = 1 << 18, 1 << 20
DISK_BYTES = 32 << 20


def seconds(plan: Plan, tokens: int, device: torch.device, folder: Path) -> dict[str, float] | None:
    """Parts and total; ``tokens`` of one calibration sequence, ``folder`` for a file that never has a name.

    "forward" runs the calibration sequences (and counts the outliers of --ratios owl), "prune" chooses, packs and
    measures, "disk" reads, writes and checks. None with options whose steps are not tried: --reconstruct, --permute,
    --dataset self.
    """
    options = plan.options
    if options.reconstruct or options.permute or options.dataset == "self":
        return None
    forward = _forward(plan, tokens, device) if plan.runs_model or _counts_outliers(plan) else 0.0
    parts = {"forward": forward, "prune": _prune(plan, device), "disk": _disk(plan, folder)}
    return {name: round(value, 2) for name, value in {**parts, "total": sum(parts.values())}.items()}


def _timed(call: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Median seconds of ``call``, which has run once before."""
    call()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _counts_outliers(plan: Plan) -> bool:
    return plan.options.ratios == "owl"


def _forward(plan: Plan, tokens: int, device: torch.device) -> float:
    """Every sequence passes every block twice, the last one once, and the statistics once; with OWL, before that, every
    block and norms of all inputs once more.
    """
    run, blocks, sequences = _running(plan, tokens, device), len(plan.blocks), plan.options.num_samples
    total = 0.0
    if plan.runs_model:
        wanted = plan.pruner.needs_gram, plan.pruner.needs_moments
        stats = sum(_collecting(plan, keys, tokens, device, *wanted) for keys in plan.blocks)
        total += sequences * (run * (2 * blocks - 1) + stats)
    if _counts_outliers(plan):
        norms = sum(_collecting(plan, keys, tokens, device, most=None) for keys in plan.blocks)
        total += sequences * (run * blocks + norms) + _counting(plan, device)
    return total


def _running(plan: Plan, tokens: int, device: torch.device) -> float:
    """Seconds of one sequence in a block. All blocks are taken to cost what the first does."""
    model, shapes = plan.structure.model, {name: p.shape for name, p in plan.structure.parameters.items()}
    elements = sum(plan.source.tensors[key].numel for key in plan.blocks[0])
    some = max(16, min(tokens, int(BLOCK_PRODUCTS / elements)))
    runner = BlockRunner(model, lambda name: torch.zeros(shapes[name], dtype=torch.bfloat16), device)
    runner.start(torch.zeros(1, some, dtype=torch.int64))
    runner.open(0)
    try:
        return _timed(lambda: runner.advance(0), device) * tokens / some
    finally:
        runner.close(0)


def _counting(plan: Plan, device: torch.device) -> float:
    """Seconds that counting outliers takes, for all weights."""
    rows = ELEMENTS[1] // COLUMNS
    pairs = [(torch.randn(rows, COLUMNS, device=device).to(torch.bfloat16), torch.ones(COLUMNS, device=device))]
    each = _timed(lambda: ratios.outliers_percent(pairs, 5.0), device) / ELEMENTS[1]
    return each * sum(d.shape[0] * d.shape[1] for d in plan.decisions.values() if d.pattern)


_TRIED: dict[tuple, float] = {}


def _collecting(
    plan: Plan,
    keys: list[str],
    tokens: int,
    device: torch.device,
    gram: bool = False,
    moments: bool = False,
    most: int | None = 2,
) -> float:
    """Seconds that the statistics of one block and sequence take; of linears that share inputs as in estimate.py, of at
    most ``most`` that may.
    """
    decisions = [d for key in keys if (d := plan.decisions.get(key)) and d.pattern]
    groups = Counter((d.name.rpartition(".")[0], d.shape[1]) for d in decisions)
    total = 0.0
    for (_, n), count in groups.items():
        width, rows = min(n, COLUMNS), min(tokens, 512)
        key = width, rows, gram, moments, str(device)
        if key not in _TRIED:
            stats = ActivationStats(width, device, gram, 10**6, moments)
            x = torch.randn(rows, width, device=device).to(torch.bfloat16)
            _TRIED[key] = _timed(lambda stats=stats, x=x: stats.add(x), device)
        scale = (n / width) ** (2 if gram else 1)
        total += min(count, most or count) * _TRIED[key] * scale * tokens / rows
    return total


def _prune(plan: Plan, device: torch.device) -> float:
    """Each weight costs something of its own (the factors of n x n moments) and something a row."""
    kinds = Counter((d.shape, d.dtype, d.pattern) for d in plan.decisions.values() if d.pattern)
    examples = {(d.shape, d.dtype, d.pattern): d for d in plan.decisions.values() if d.pattern}
    tried: dict[tuple, tuple[float, float]] = {}
    total = 0.0
    for kind, count in kinds.items():
        (m, n), dtype, pattern = kind
        fmt = get_format("unstructured") if pattern == AUTO else plan.format_of(examples[kind])
        width = min(n, COLUMNS // (fmt.group or 1) * (fmt.group or 1))
        key = width, dtype, pattern
        if key not in tried:
            rows = [max(1 + number, size // width) for number, size in enumerate(ELEMENTS)]
            few, more = (_trial(plan, fmt, count, width, dtype, device) for count in rows)
            each = max((more - few) / (rows[1] - rows[0]), 0.0)
            tried[key] = max(few - rows[0] * each, 0.0), each
        once, each = tried[key]
        gram = plan.pruner.needs_gram
        total += count * (once * (n / width) ** (3 if gram else 1) + m * each * (n / width) ** (2 if gram else 1))
    return total


def _trial(plan: Plan, fmt: Format, rows: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds from a dense weight (rows, n) to what is stored, as conversion/write.py does it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, n, generator=generator)
    weight = torch.where(fmt.mask_from_scores(weight.abs(), plan.sparsity), weight, 0).to(dtype)
    stats = None
    if plan.runs_model:
        wanted = plan.pruner.needs_gram, 1, plan.pruner.needs_moments
        stats = ActivationStats(n, device, *wanted)
        stats.add(torch.randn(2 * n, n, generator=generator).to(device))

    def work() -> None:
        check_finite("weight", weight)
        dense = normalize_zeros(weight).to(device)
        pruned = Pruned(*plan.pruner.prune(dense, stats, fmt, plan.sparsity))
        metadata, size = fmt.pack_mask(pruned.mask), int(pruned.mask.count_nonzero())
        like = pruned.weight.new_empty(fmt.values_shape(rows, n, size))
        values = ops.gather(pruned.weight, metadata, fmt.pattern, rows, n, like)
        stored = Compressed(fmt.pattern, values.to(dtype), metadata)
        for tensor in (stored.values, stored.metadata):
            _digest(tensor.cpu())
        if stats is not None:
            stats.reconstruction_error(dense, stored.dense(rows, n))
        del dense, pruned, values, stored
        release()

    return _timed(work, device, repeats=1 if plan.pruner.needs_gram else 3)


def _digest(tensor: Tensor) -> None:
    hashlib.sha256(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))


def _disk(plan: Plan, folder: Path) -> float:
    """Reading the source (the blocks once more when they are run), writing, twice more without waiting for the disk
    (into the spool and out of it), reading again for the manifest's digests; and a line of notes a weight."""
    source = next(iter(plan.source.checkpoint.headers)).file
    with source.open("rb", buffering=0) as file:
        start = time.perf_counter()
        read = max(len(file.read(DISK_BYTES)), 1)
        reading = (time.perf_counter() - start) / read
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=_existing(folder), buffering=0) as file:
        start = time.perf_counter()
        for _ in range(DISK_BYTES >> 20):
            file.write(data)
        spooling = 2 * (time.perf_counter() - start) / DISK_BYTES
        os.fsync(file.fileno())
        writing = (time.perf_counter() - start) / DISK_BYTES
        start = time.perf_counter()
        file.write(b"a note\n")
        os.fsync(file.fileno())
        note = time.perf_counter() - start
        file.seek(0)
        start = time.perf_counter()
        hashlib.file_digest(file, "sha256")
        checking = (time.perf_counter() - start) / DISK_BYTES
    before, after = plan.totals()["dense_bytes"], plan.totals()["compressed_bytes"]
    notes = note * sum(d.pattern is not None for d in plan.decisions.values())
    passes = 1 + plan.runs_model + _counts_outliers(plan)
    return before * reading * passes + after * (spooling + writing + checking) + notes


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())
