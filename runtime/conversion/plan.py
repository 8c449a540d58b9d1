"""What a conversion will do, from headers alone: every linear weight gets a pattern, or a reason to stay dense."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparse_rt.checkpoint import SparseConfig, matches
from sparse_rt.checkpoint.config import Override
from sparse_rt.config import ConvertOptions
from sparse_rt.conversion import structure as kinds
from sparse_rt.conversion.detect import AUTO, Detected, most_common
from sparse_rt.conversion.overrides import compact_overrides
from sparse_rt.conversion.source import Source, SourceTensor
from sparse_rt.conversion.structure import Structure
from sparse_rt.errors import UserError
from sparse_rt.formats import VALUE_DTYPES, Format, get_format
from sparse_rt.formats.base import num_kept
from sparse_rt.formats.wrapper import BLOCK_DIAGONAL
from sparse_rt.pruning import Pruner, find_blocks, get_pruner, ratios
from sparse_rt.pruning.transposable import TransposableFormat

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEAD = "a head or pooler outside of the encoder's blocks; with --ignore only what it names stays dense"


@dataclass
class Decision:
    """One linear weight: ``key`` in the checkpoint, ``name`` is the key without ".weight"; dense when no pattern.

    ``pattern`` is "auto" until the weight is read, where its zeros decide.
    """

    key: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the stored values
    pattern: str | None = None
    reason: str | None = None  # why it stays dense
    nnz: int | None = None  # kept weights, None when only the data tells
    sparsity: float | None = None  # that an unstructured weight is pruned to, None where pattern or data decide
    overridden: bool = False  # the pattern was chosen for this weight, not for the model
    detected: Detected | None = None  # what its zeros said
    blocks: tuple[int, int] | None = None  # block sizes of its wrapper, None without one

    @property
    def dense_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def stored_bytes(self, assumed_sparsity: float) -> int:
        """Bytes on disk; where the data decides, ``assumed_sparsity`` stands in."""
        if self.pattern is None:
            return self.dense_bytes
        fmt, (m, n) = get_format("unstructured" if self.pattern == AUTO else self.pattern), self.shape
        nnz = num_kept(m * n, assumed_sparsity) if self.nnz is None else self.nnz
        wrapper = 0 if self.blocks is None else m * self.blocks[0] + n * self.blocks[1]
        return (nnz + wrapper) * self.dtype.itemsize + torch.Size(fmt.metadata_shape(m, n)).numel()


@dataclass
class Plan:
    """All decisions of one conversion. ``blocks`` holds the keys of every decoder block when the model is run."""

    options: ConvertOptions
    source: Source
    structure: Structure
    pruner: Pruner
    decisions: dict[str, Decision]
    outside: list[str]
    blocks: list[list[str]]
    blocks_name: str | None
    unmatched: list[str]  # linear modules of the model without a tensor of their name
    notes: list[str]

    def stored_dtype(self, tensor: SourceTensor) -> torch.dtype:
        return stored_dtype(self.options.dtype, tensor)

    def sparse_config(self) -> SparseConfig:
        """``quantization_config`` of the result: ``ignore`` names every linear module left dense, in full."""
        ignore = self._left_dense()
        compressed = [d for d in self.decisions.values() if d.pattern]
        if self.options.pattern == AUTO:
            own = most_common(d.pattern for d in compressed if not d.overridden)
        else:
            own = get_format(self.options.pattern).pattern
        given = self.options.overrides
        # The order of overrides is lost in config.json: where two of them contradict each other, weights are named.
        if any(len({p for name, p in given.items() if matches(d.name, name)}) > 1 for d in compressed):
            given = {}
        others = {d.name: d.pattern for d in compressed if not (d.overridden and given)}
        others = {name: pattern for name, pattern in others.items() if pattern not in (AUTO, own)}
        overrides = {name: Override(pattern=pattern) for name, pattern in given.items()} | compact_overrides(others)
        wrapper = BLOCK_DIAGONAL if self.pruner.wraps else None
        return SparseConfig(pattern=own, wrapper=wrapper, ignore=ignore, overrides=overrides)

    def _left_dense(self) -> list[str]:
        """Names of all modules left dense, experts of a block that all are by one pattern."""
        left = [d for d in self.decisions.values() if d.pattern is None]
        compressed = {_experts(d.name) for d in self.decisions.values() if d.pattern}
        dense = {prefix for d in left if (prefix := _experts(d.name)) and prefix not in compressed}
        left = [d for d in left if _experts(d.name) not in dense]
        names = [d.name for d in left] + [f"re:{re.escape(prefix)}(\\..*)?" for prefix in sorted(dense)]
        modules = (self.structure.module_of(d.key) for d in left)  # the model may call a module otherwise than the file
        return names + [n for n in (*modules, *self.unmatched) if n and not any(matches(n, known) for known in names)]

    def format_of(self, decision: Decision) -> Format:
        """The format that chooses the mask of ``decision``."""
        return choosing_format(decision.pattern, self.options)

    def inner_name(self, index: int, decision: Decision) -> str:
        """Name of the linear of ``decision`` inside its block ``index``."""
        return self.structure.module_of(decision.key).removeprefix(f"{self.blocks_name}.{index}.")

    @property
    def sparsity(self) -> float:
        return self.options.sparsity

    @property
    def runs_model(self) -> bool:
        """Whether calibration text passes through the model, block by block."""
        return runs_model(self.options, self.pruner)

    def totals(self) -> dict[str, Any]:
        """Bytes of the whole model and coverage in percent of the bytes of all linear weights."""
        linear = sum(d.dense_bytes for d in self.decisions.values())
        covered = sum(d.dense_bytes for d in self.decisions.values() if d.pattern)
        before, after = sum(self._other_sizes()) + linear, self.compressed_bytes(self.sparsity)
        return {
            "dense_bytes": before,
            "compressed_bytes": after,
            "ratio": round(after / before, 4),
            "linear_bytes": linear,
            "coverage_percent": round(100 * covered / linear, 2) if linear else 0.0,
        }

    def compressed_bytes(self, assumed_sparsity: float) -> int:
        """Bytes of all tensors of the result; where the data decides, ``assumed_sparsity`` stands in."""
        return sum(self.stored_sizes(assumed_sparsity))

    def stored_sizes(self, assumed_sparsity: float) -> Iterator[int]:
        """Bytes of each tensor of the result, of a compressed weight all of its tensors."""
        yield from self._other_sizes()
        yield from (decision.stored_bytes(assumed_sparsity) for decision in self.decisions.values())

    def _other_sizes(self) -> Iterator[int]:
        """Of what is no weight of a linear module."""
        for key, tensor in self.source.tensors.items():
            if key not in self.decisions:
                yield tensor.numel * self.stored_dtype(tensor).itemsize

    def pruned_in(self, index: int) -> list[Decision]:
        """The weights of block ``index`` that are compressed, in the order of the file."""
        return [d for key in self.blocks[index] if (d := self.decisions.get(key)) and d.pattern]

    def skipped(self) -> list[dict[str, Any]]:
        return [
            {"name": d.name, "shape": list(d.shape), "reason": d.reason}
            for d in self.decisions.values()
            if d.pattern is None
        ]


def _experts(name: str) -> str | None:
    """The experts that ``name`` is a part of."""
    match = re.match(r"(.*\.experts)(\.|$)", name)
    return match[1] if match else None


def runs_model(options: ConvertOptions, pruner: Pruner) -> bool:
    return pruner.needs_calibration or options.reconstruct > 0 or options.permute or options.ratios == "owl"


def owl_setting(options: ConvertOptions) -> tuple[float, float]:
    """(lambda, threshold): the options', by default those published for the kind of pattern."""
    spread, threshold = ratios.GROUPED if get_format(options.pattern).group else ratios.UNSTRUCTURED
    return (
        spread if options.owl_lambda is None else options.owl_lambda,
        threshold if options.owl_threshold is None else options.owl_threshold,
    )


def choosing_format(pattern: str, options: ConvertOptions) -> Format:
    fmt = get_format(pattern)
    return TransposableFormat(fmt) if options.transposable and fmt.group else fmt


def stored_dtype(option: str, tensor: SourceTensor) -> torch.dtype:
    """Dtype a source tensor is written in; integer tensors stay as they are."""
    if option == "auto" or not tensor.dtype.is_floating_point:
        return tensor.dtype
    if option not in DTYPES:
        raise UserError(f"dtype {option!r} is not known; allowed are auto, {', '.join(DTYPES)}")
    return DTYPES[option]


def make_plan(options: ConvertOptions, source: Source, structure: Structure) -> Plan:
    """Decide for every linear weight of ``source``; reads no tensor data.

    Raises ``UserError`` for an unknown pattern, method or dtype, a sparsity that contradicts the pattern, an override
    that names no linear module, or when nothing would be compressed.
    """
    pruner = _pruner(options)
    notes = _check_options(options, pruner)
    blocks_name, count = None, 0
    if runs_model(options, pruner):
        blocks_name, modules = find_blocks(structure.model)
        count = len(modules)
        _refuse_shared(structure, count)
        for parameter in structure.parameters:
            if parameter.startswith(f"{blocks_name}.") and not structure.has(parameter):
                raise _missing(parameter, source, pruner)
    body = _body(options, structure)
    decisions: dict[str, Decision] = {}
    outside: list[str] = []
    blocks: list[list[str]] = [[] for _ in range(count)]
    for key, tensor in source.tensors.items():
        index = _block_index(key, structure, blocks_name)
        (outside if index is None else blocks[index]).append(key)
        kind = structure.kind(key, len(tensor.shape))
        if kind != kinds.OTHER:
            decision = decisions[key] = _decide(options, pruner, structure, key, tensor, kind, index)
            if decision.pattern and body and _block_index(key, structure, body) is None:
                decision.pattern, decision.reason = None, HEAD
    _check_names(options, decisions, structure, notes)
    if not any(d.pattern for d in decisions.values()):
        reasons = sorted({d.reason for d in decisions.values()})
        raise UserError(f"nothing to compress in {source.model}: {'; '.join(reasons) or 'it has no linear weight'}")
    if options.ratios == "owl" and not any(
        (d := decisions.get(key)) and d.pattern and not d.overridden for keys in blocks for key in keys
    ):
        raise UserError("--ratios owl finds no weight in the decoder blocks without a pattern of its own (--overrides)")
    found = {structure.module_of(key) for key in decisions}
    unmatched = [name for name in structure.linears if name not in found]
    missing = [name for name in unmatched if name != structure.tied_head]
    if missing:
        notes.append(f"{len(missing)} linear modules have no tensor of their own name, such as {missing[0]}")
    return Plan(options, source, structure, pruner, decisions, outside, blocks, blocks_name, unmatched, notes)


def _body(options: ConvertOptions, structure: Structure) -> str | None:
    """Name of the blocks that alone are compressed: those of an encoder, unless the user says what stays dense."""
    if not structure.is_encoder or "ignore" in options.model_fields_set:
        return None
    try:
        return find_blocks(structure.model)[0]
    except UserError:  # it has none; every linear weight is like the others
        return None


def _refuse_shared(structure: Structure, blocks: int) -> None:
    """``UserError`` for layers that share their weights (ALBERT): no block has inputs of its own."""
    layers = getattr(structure.model.config, "num_hidden_layers", blocks)
    if isinstance(layers, int) and layers > blocks:
        raise UserError(
            f"{type(structure.model).__name__} runs {layers} layers on {blocks} block(s) of weights, so it cannot be "
            "calibrated block by block; use --method magnitude or none without --reconstruct"
        )


def _missing(parameter: str, source: Source, pruner: Pruner) -> UserError:
    who, instead = pruner.name, "use --method magnitude"
    if not pruner.needs_calibration:
        who, instead = "--reconstruct, --permute or --ratios", "leave it out"
    return UserError(
        f"{who} must run the model, and {source.model} has no tensor for {parameter}; copy the model again or {instead}"
    )


def _pruner(options: ConvertOptions) -> Pruner:
    """That of ``--method``; ``UserError`` where it cannot do what the other options ask for."""
    pruner = get_pruner(options.method)
    for pattern in (options.pattern, *options.overrides.values()):
        refusal = None if pattern == AUTO else pruner.refuse_pattern(get_format(pattern))
        if refusal:
            raise UserError(f"--method {options.method} cannot prune to {pattern}: {refusal}")
    if options.wrapper_block is not None:
        if not pruner.wraps:
            raise UserError(f"--wrapper-block is for --method armor, not for {options.method}; leave it out")
        pruner.block = options.wrapper_block
    return pruner


def _check_options(options: ConvertOptions, pruner: Pruner) -> list[str]:
    notes = []
    if options.pattern == AUTO and options.method != "none":
        raise UserError(
            f"--pattern auto finds the pattern of a model that is pruned already, and --method {options.method} "
            "prunes; give it a pattern (2:4, N:M, unstructured), or --method none"
        )
    fmt = get_format("unstructured" if options.pattern == AUTO else options.pattern)
    for pattern in options.overrides.values():
        get_format(pattern)
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise UserError(f"dtype {options.dtype!r} is not known; allowed are auto, {', '.join(DTYPES)}")
    fixed = fmt.default_sparsity
    used = fixed is None or "unstructured" in options.overrides.values()
    if not used and "sparsity" in options.model_fields_set and abs(options.sparsity - fixed) > 1e-9:
        raise UserError(
            f"sparsity {options.sparsity} contradicts the pattern {fmt.pattern}, which removes {fixed:g}; leave "
            "--sparsity out, or choose --pattern unstructured"
        )
    if options.method == "none" and options.reconstruct:
        raise UserError(
            "--reconstruct trains a pruned block to give the output of the dense one, and with --method none there is "
            "no dense one; convert the model as it was before pruning, with a --method that prunes"
        )
    if options.self_temperature is not None and options.dataset != "self":
        raise UserError("--self-temperature is an option of --dataset self; add that, or leave it out")
    _check_ratios(options, fmt)
    _check_permute(options)
    if options.transposable:
        _check_transposable(options, fmt, pruner)
    if options.method == "none" and "sparsity" in options.model_fields_set:
        notes.append("--sparsity is not used by --method none: the zeros of the model decide")
    return notes


def _check_ratios(options: ConvertOptions, fmt: Format) -> None:
    if options.ratios != "owl":
        given = [name for name in ("owl_lambda", "owl_threshold") if getattr(options, name) is not None]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} is an option of --ratios owl; add that, or leave it out")
        return
    if options.method == "none":
        raise UserError(
            "--ratios owl chooses how much is pruned in every block, and --method none prunes nothing; leave it out, "
            "or choose a --method that prunes"
        )
    sparsity = options.sparsity if fmt.default_sparsity is None else fmt.default_sparsity
    ratios.check_spread(owl_setting(options)[0], sparsity, fmt.group)


def _check_permute(options: ConvertOptions) -> None:
    if not options.permute:
        return
    if options.method == "none":
        raise UserError(
            "--permute puts input channels in another order before they are pruned, and --method none prunes nothing; "
            "leave it out, or choose a --method that prunes"
        )
    if not any(get_format(pattern).group for pattern in (options.pattern, *options.overrides.values())):
        raise UserError(
            f"--permute is for N:M patterns, whose groups it fills anew, and the pattern is {options.pattern}; leave "
            "it out, or choose a --pattern such as 2:4"
        )


def _check_transposable(options: ConvertOptions, fmt: Format, pruner: Pruner) -> None:
    if not pruner.prunes:
        raise UserError(
            f"--transposable chooses a mask, and --method {pruner.name} takes the one that is there; leave it out, or "
            "choose a --method that prunes"
        )
    if not fmt.group:
        raise UserError(
            f"--transposable needs groups in rows and columns, and the pattern {fmt.pattern} has none; choose N:M, for "
            "example --pattern 2:4"
        )
    if not pruner.keeps_columns:
        raise UserError(
            f"--method {pruner.name} chooses single positions within their row, whatever a column keeps; use "
            "--transposable with another method or without that repair"
        )


def _block_index(key: str, structure: Structure, blocks_name: str | None) -> int | None:
    if blocks_name is None:
        return None
    match = re.match(rf"{re.escape(blocks_name)}\.(\d+)\.", structure.target(key))
    return int(match[1]) if match else None


def _decide(
    options: ConvertOptions,
    pruner: Pruner,
    structure: Structure,
    key: str,
    tensor: SourceTensor,
    kind: str,
    block: int | None,
) -> Decision:
    name = key.removesuffix(".weight")
    dtype = stored_dtype(options.dtype, tensor)
    decision = Decision(key, name, tensor.shape, dtype)
    if kind == kinds.TIED:
        decision.reason = "tied to the embedding"
    elif kind == kinds.FUSED:
        decision.reason = structure.why_fused(key)
    elif kind == kinds.UNKNOWN:
        decision.reason = "the model has no parameter of this name: transformers drops it while loading"
    elif kind == kinds.FOREIGN:
        decision.reason = f"belongs to {structure.owner(key)}, which is not an nn.Linear"
    elif any(matches(one, pattern) for pattern in options.ignore for one in (name, structure.module_of(key))):
        decision.reason = "ignored"
    elif dtype not in VALUE_DTYPES:
        decision.reason = f"{dtype} values cannot be compressed; allowed are {', '.join(DTYPES)} (--dtype)"
    elif pruner.needs_calibration and block is None:
        decision.reason = f"outside of the decoder blocks, which are all that {pruner.name} calibrates"
    else:
        chosen = next((p for pattern, p in options.overrides.items() if matches(name, pattern)), None)
        decision.overridden = chosen is not None
        chosen = chosen or options.pattern
        if chosen == AUTO:
            decision.pattern, decision.nnz = AUTO, tensor.nnz
            return decision
        fmt = choosing_format(chosen, options)
        decision.reason = fmt.refuse_shape(*tensor.shape)
        if decision.reason is None:
            decision.pattern = fmt.pattern
            decision.blocks = pruner.blocks(*tensor.shape, fmt)
            decision.sparsity = options.sparsity if pruner.prunes and fmt.default_sparsity is None else None
            known = pruner.prunes or fmt.default_sparsity is not None
            decision.nnz = known_count(fmt, pruner, tensor.shape, decision.sparsity) if known else tensor.nnz
    return decision


def known_count(fmt: Format, pruner: Pruner, shape: tuple[int, ...], sparsity: float | None) -> int:
    """Kept weights of a matrix that ``pruner`` prunes; N:M patterns need no ``sparsity``."""
    m, n = shape
    if fmt.default_sparsity is not None:
        return torch.Size(fmt.values_shape(m, n, 0)).numel()
    return m * num_kept(n, sparsity) if pruner.scope == "row" else num_kept(m * n, sparsity)


def _check_names(options: ConvertOptions, decisions: dict[str, Decision], structure: Structure, notes: list[str]):
    """A pattern of --overrides that means nothing is an error, one of --ignore a note: lm_head may be tied."""
    names = [d.name for d in decisions.values()] + list(structure.linears)
    for pattern in options.overrides:
        if not any(matches(name, pattern) for name in names):
            raise UserError(
                f"--overrides {pattern}: no linear module has this name; use a full name, its last parts or re:PATTERN "
                f"(there is for example {names[0] if names else 'none at all'})"
            )
    for pattern in options.ignore:
        if not any(matches(name, pattern) for name in names):
            notes.append(f"--ignore {pattern}: no linear module has this name")
