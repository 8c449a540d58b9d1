"""A ratio for every decoder block before any is pruned: one more pass over the unpruned model, one block in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_rt.conversion import notes
from sparse_rt.conversion.plan import Decision, Plan, known_count, owl_setting
from sparse_rt.formats import Format, get_format
from sparse_rt.formats.base import num_kept
from sparse_rt.progress import Progress
from sparse_rt.pruning import ActivationStats, BlockRunner, ratios


def set_ratios(
    plan: Plan,
    load: Callable[[str], Tensor],
    tokens: Tensor,
    device: torch.device,
    folder: Path,
    mark: str,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Give every weight of ``plan`` that has the model's pattern the ratio of its block; what was found, by block.

    Outliers are counted once: a resumed conversion (equal ``mark``) reads them from ``folder``.
    """
    _, threshold = owl_setting(plan.options)
    outliers = notes.stored(folder, notes.OUTLIERS, mark)
    if outliers is None:
        outliers = _count_outliers(plan, load, tokens, device, threshold, progress, folder)
        notes.store(folder, notes.OUTLIERS, mark, outliers)
    return apply_outliers(plan, outliers)


def apply_outliers(plan: Plan, outliers: list[float]) -> dict[str, dict[str, float]]:
    """Set ``sparsity`` (unstructured) or ``pattern`` (N:M) of the decisions from D of every block."""
    spread, _ = owl_setting(plan.options)
    taking = [
        [d for key in keys if (d := plan.decisions.get(key)) and d.pattern and not d.overridden] for keys in plan.blocks
    ]
    sizes = [sum(torch.Size(d.shape).numel() for d in decisions) for decisions in taking]
    fmt = get_format(plan.options.pattern)
    used = [index for index, size in enumerate(sizes) if size]
    densities = ratios.owl_densities(
        [outliers[i] for i in used], [sizes[i] for i in used], _mean_sparsity(plan, fmt), spread
    )
    chosen = {i: taking[i] for i in used}
    if fmt.group:
        _set_patterns(plan, fmt, list(chosen.values()), densities)
    else:
        _set_sparsities(plan, list(chosen.values()), densities)
    found = {}
    for index, decisions in chosen.items():
        kept = sum(d.nnz for d in decisions)
        facts = {"outliers_percent": round(outliers[index], 6), "sparsity": round(1 - kept / sizes[index], 6)}
        found[f"{plan.blocks_name}.{index}"] = facts
    if len({facts["sparsity"] for facts in found.values()}) == 1:
        plan.notes.append(
            "--ratios owl came out uniform: no block differs enough in its outliers for another ratio; a higher "
            "--owl-lambda or another --owl-threshold may tell them apart"
        )
    return found


def _mean_sparsity(plan: Plan, fmt: Format) -> float:
    return plan.sparsity if fmt.default_sparsity is None else fmt.default_sparsity


def _set_sparsities(plan: Plan, blocks: list[list[Decision]], densities: list[float]) -> None:
    """What a matrix (or each of its rows) keeps is a whole number: chosen such that all together keep 1 - S."""
    rows = plan.pruner.scope == "row"
    decisions = [(d, density) for block, density in zip(blocks, densities, strict=True) for d in block]
    groups = [(d.shape[0], d.shape[1]) if rows else (1, torch.Size(d.shape).numel()) for d, _ in decisions]
    total = num_kept(sum(count * size for count, size in groups), plan.sparsity)
    ideal = [size * density for (_, size), (_, density) in zip(groups, decisions, strict=True)]
    kept = ratios.apportion(ideal, [count for count, _ in groups], total)
    for (decision, _), (_, size), count in zip(decisions, groups, kept, strict=True):
        decision.sparsity = ratios.sparsity_keeping(count, size)
        decision.nnz = known_count(get_format(decision.pattern), plan.pruner, decision.shape, decision.sparsity)


def _set_patterns(plan: Plan, fmt: Format, blocks: list[list[Decision]], densities: list[float]) -> None:
    steps = [sum(torch.Size(d.shape).numel() // fmt.group for d in block) for block in blocks]
    total = sum(d.nnz for block in blocks for d in block)
    for block, kept in zip(blocks, ratios.apportion([fmt.group * d for d in densities], steps, total), strict=True):
        chosen = get_format(f"{kept}:{fmt.group}")
        for decision in block:
            decision.pattern = chosen.pattern
            decision.nnz = known_count(chosen, plan.pruner, decision.shape, None)


def _count_outliers(
    plan: Plan,
    load: Callable[[str], Tensor],
    tokens: Tensor,
    device: torch.device,
    threshold: float,
    progress: Progress,
    folder: Path,
) -> list[float]:
    """D of every block of the unpruned model, all its linear weights that will be pruned pooled."""
    runner = BlockRunner(
        plan.structure.model, load, device, offload=folder if plan.options.offload_activations else None
    )
    progress.stage(f"embedding {len(tokens)} calibration sequences of {tokens.shape[1]} tokens")
    runner.start(tokens)
    outliers = []
    for index in progress.track(range(len(plan.blocks)), "outliers, block by block", total=len(plan.blocks)):
        decisions = [d for key in plan.blocks[index] if (d := plan.decisions.get(key)) and d.pattern]
        stats = {
            plan.inner_name(index, d): ActivationStats(d.shape[1], device, expected_sequences=len(tokens))
            for d in decisions
        }
        block = runner.open(index)
        runner.collect(index, stats, advance=index + 1 < len(plan.blocks))
        for name, seen in stats.items():
            seen.check_finite(f"{runner.block_name(index)}.{name}")
        # A linear that no sequence reached has norms of 0, and no outliers.
        pairs = [(block.get_submodule(name).weight, seen.sum_squares.sqrt()) for name, seen in stats.items()]
        outliers.append(ratios.outliers_percent(pairs, threshold) if pairs else 0.0)
        runner.close(index)
    return outliers


def ratio_facts(plan: Plan, found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """For result, manifest and model card."""
    spread, threshold = owl_setting(plan.options)
    return {"method": plan.options.ratios, "lambda": spread, "threshold": threshold, "blocks": found}
