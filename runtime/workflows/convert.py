"""``sparse-rt convert``: prune (or not), compress and save a model, one decoder block in memory."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_rt.checkpoint import CheckpointWriter, check_output, output_directory, partial_path
from sparse_rt.checkpoint.writer import JOURNAL_NAME
from sparse_rt.config import ConvertOptions, parse_size
from sparse_rt.conversion import (
    Plan,
    Source,
    Writing,
    experts,
    make_plan,
    open_source,
    permute,
    ratios,
    read_structure,
    selfgen,
    timing,
    write_weights,
)
from sparse_rt.conversion.crew import Crew, join, refuse_alone
from sparse_rt.conversion.detect import AUTO, refuse_unpruned, transposed_note
from sparse_rt.conversion.estimate import peak_memory
from sparse_rt.conversion.files import copy_small_files, refuse_same_folder
from sparse_rt.conversion.memory import keep_heap_small
from sparse_rt.conversion.notes import remove_notes
from sparse_rt.conversion.plan import owl_setting
from sparse_rt.conversion.room import disk_bytes, refuse_full_disk
from sparse_rt.conversion.write import follow
from sparse_rt.data import read_texts, token_windows
from sparse_rt.device import pick_device
from sparse_rt.errors import UserError
from sparse_rt.families import auto_class
from sparse_rt.hf.load import load_tokenizer
from sparse_rt.modelcard import model_card
from sparse_rt.progress import Progress
from sparse_rt.pruning import BlockRunner
from sparse_rt.report import size
from sparse_rt.version import __version__

# Options that change the bytes written; with another value for one of them an interrupted run is not continued.
RELEVANT = ("pattern", "sparsity", "method", "num_samples", "seed", "ignore", "overrides", "dtype", "max_shard_size")
RELEVANT += ("reconstruct", "reconstruct_learning_rate", "ratios", "owl_lambda", "owl_threshold", "permute")
RELEVANT += ("transposable", "wrapper_block")

# What a calibrated run loads besides: the tokenizer, the text, the libraries' code that only a forward pass needs.
RUNNING_BYTES = 60_000_000


def convert(options: ConvertOptions, progress: Progress | None = None) -> dict[str, Any] | None:
    """Convert ``options.model``; with ``dry_run`` only say what would be done, from headers.

    Raises ``UserError`` / ``FormatError`` for options and sources that cannot work, always before the output folder
    appears. An interruption keeps the finished shards in a hidden sibling of the output for ``--resume``; they are
    thrown away by ``--overwrite`` only.

    ``reconstruct`` is an option here and no step of its own, because what it needs streams by here one block at a time:
    the dense weights, and the activations of the dense and of the pruned model.

    Under ``accelerate launch`` or torchrun the processes share the calibration sequences. The first one writes and has
    the result, the others None.
    """
    start = time.perf_counter()
    keep_heap_small()
    device = pick_device(options.device)
    crew = join(device)
    try:
        result = _convert(options, progress if progress and crew.leads else Progress(), crew, crew.device(device))
    finally:
        crew.leave()
    if result is not None and not options.dry_run:
        result["seconds"] = round(time.perf_counter() - start, 2)
        result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def _convert(options: ConvertOptions, progress: Progress, crew: Crew, device: torch.device) -> dict[str, Any] | None:
    with crew.together():
        output = check_output(options.output_dir, options.overwrite)
        parse_size(options.max_shard_size)
        progress.stage("reading headers")
        source = open_source(options.model, options.revision)
        refuse_same_folder(source.folder, output)
        plan = make_plan(options, source, read_structure(source.folder, source.shapes))
        for note in plan.notes:
            progress.note(note)
        sampled = plan.runs_model and options.dataset == selfgen.SELF
        alone = {"--reconstruct": options.reconstruct > 0, "--permute": options.permute, "--dataset self": sampled}
        refuse_alone(crew, alone | {"--ratios owl": options.ratios == "owl"})
        if options.dry_run:
            return dry_run(plan, device, progress) if crew.leads else None
        if crew.leads:  # the others write nothing
            refuse_full_disk(plan, output)
        if not plan.pruner.prunes:
            progress.stage("looking for zeros")
            refuse_unpruned(source, plan.decisions.values())
        if sampled:
            selfgen.check_writes(plan)
            selfgen.check_room(source, device)
        tokens = calibration_tokens(plan, progress) if plan.runs_model and not sampled else None
        refuse_unfinished(output, options)
    if crew.leads:
        return _lead(plan, output, tokens, device, progress, crew)
    with crew.together():  # the first process opens the output folder
        runner = _runner(plan, tokens, device, output.parent)
    follow(plan, runner, tokens, crew)
    with crew.together():  # it finishes the folder
        return None


def _lead(
    plan: Plan, output: Path, tokens: Tensor | None, device: torch.device, progress: Progress, crew: Crew
) -> dict[str, Any]:
    """The work of the process that writes."""
    options = plan.options
    with ExitStack() as stack:
        with crew.together():
            folder = output_directory(output, options.overwrite, resume=options.resume, keep=True)
            partial = stack.enter_context(folder)
            if plan.runs_model and tokens is None:
                tokens = sampled_tokens(plan, device, partial, progress)
            mark = fingerprint(plan, tokens, device)
            described = stored_config(plan), plan.sparse_config()
            limit = parse_size(options.max_shard_size)
            writer = CheckpointWriter(partial, *described, limit, mark, options.resume)
        try:
            result = _write(plan, writer, tokens, device, progress, crew)
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)  # bad input stays bad: there is nothing to resume
            raise
        except BaseException:
            if (partial / JOURNAL_NAME).is_file():
                progress.note(f"interrupted: the finished shards are kept in {partial}, --resume goes on with them")
            else:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    result["output_dir"] = str(output)
    return result


def _runner(plan: Plan, tokens: Tensor | None, device: torch.device, folder: Path) -> BlockRunner | None:
    """What runs the model block by block, if it must be run; ``folder`` is for activations on disk."""
    if tokens is None:
        return None
    offload = folder if plan.options.offload_activations else None
    return BlockRunner(plan.structure.model, parameter_loader(plan), device, plan.options.reconstruct > 0, offload)


def refuse_unfinished(output: Path, options: ConvertOptions) -> None:
    """Hours of calibration may lie in an unfinished conversion: only ``--overwrite`` throws it away."""
    if (partial_path(output) / JOURNAL_NAME).is_file() and not (options.resume or options.overwrite):
        raise UserError(
            f"an earlier conversion to {output} was interrupted; pass --resume to go on with it, or --overwrite to "
            "start over"
        )


def _write(
    plan: Plan, writer: CheckpointWriter, tokens: Tensor | None, device: torch.device, progress: Progress, crew: Crew
) -> dict[str, Any]:
    if writer.done:
        progress.note(f"resuming: {len(writer.done)} tensors and weights are on disk already")
    blocks = {}
    if plan.options.ratios == "owl":
        where = writer.folder, writer.fingerprint
        blocks = ratios.set_ratios(plan, parameter_loader(plan), tokens, device, *where, progress)
        writer.sparse = plan.sparse_config()
    writing = Writing(plan, writer, device, plan.options.resume, crew)
    write_weights(writing, _runner(plan, tokens, device, writer.folder), tokens, progress)
    with crew.together():
        return _finish(plan, writing, blocks, tokens, progress)


def _finish(
    plan: Plan, writing: Writing, blocks: dict[str, dict[str, float]], tokens: Tensor | None, progress: Progress
) -> dict[str, Any]:
    """Everything of the folder but the shards: config, index, manifest, model card, tokenizer; the result."""
    writer = writing.writer
    facts = report(plan, writing.facts.known, writer)
    if blocks:
        facts["ratios"] = ratios.ratio_facts(plan, blocks)
    if plan.options.permute:
        facts |= permute.facts_of(writing.facts.known, plan)
    writer.sparse = plan.sparse_config()  # weights may have stayed dense because of what their data showed
    copy_small_files(plan.source.folder, writer.folder)
    auto = auto_class(plan.structure.model.config).__name__
    about = {"source": source_facts(plan.source), "options": used_options(plan, tokens)}
    (writer.folder / "README.md").write_text(model_card(about | facts, plan.source.folder, writer.sparse, auto))
    kept = (
        "coverage_percent",
        "skipped",
        "reconstruction_error",
        "block_error",
        "ratios",
        "permuted",
        "unseen_experts",
    )
    progress.stage("writing index and manifest")
    writer.finish(about | {key: facts[key] for key in kept if key in facts})
    writing.facts.remove()
    remove_notes(writer.folder)
    return about | facts


def report(plan: Plan, facts: dict[str, dict[str, Any]], writer: CheckpointWriter) -> dict[str, Any]:
    """Bytes, coverage, patterns, achieved sparsity and errors of a written model; refuses an empty result.

    ``patterns`` counts the compressed weights of each pattern, the most common first.
    ``reconstruction_error`` is what the pruner did to the output of each linear, ``block_error`` the distance of each
    block's output to the dense model's before and after ``--reconstruct``.
    """
    writer.flush()
    decisions = [d for d in plan.decisions.values() if d.pattern]
    if not decisions:
        raise UserError(
            f"no weight of {plan.source.model} was compressed: {plan.skipped()[0]['reason']}; "
            "prune it, for example with --method magnitude"
        )
    totals = plan.totals()
    totals["compressed_bytes"] = writer.total_bytes
    totals["ratio"] = round(writer.total_bytes / totals["dense_bytes"], 4)
    sparsity = {d.name: facts[d.name]["sparsity"] for d in decisions}
    errors = {d.name: e for d in decisions if (e := facts[d.name].get("reconstruction_error")) is not None}
    elements = {d.name: torch.Size(d.shape).numel() for d in decisions}
    mean = sum(sparsity[name] * count for name, count in elements.items()) / sum(elements.values())
    result = {**totals, "mean_sparsity": round(mean, 6), "sparsity": sparsity, "skipped": plan.skipped()}
    result["patterns"] = dict(sorted(Counter(d.pattern for d in decisions).items(), key=lambda item: (-item[1], item)))
    down = {d.name: d.detected.transposed for d in decisions if d.detected and d.detected.transposed}
    plan.notes.extend(transposed_note(down))
    if errors:
        result["reconstruction_error"] = errors
        result["mean_reconstruction_error"] = round(sum(errors.values()) / len(errors), 6)
    blocks = {name: fact["block_error"] for name, fact in facts.items() if "block_error" in fact}
    if blocks:
        result["block_error"] = blocks
        for when in ("before", "after"):
            result[f"mean_block_error_{when}"] = round(sum(e[when] for e in blocks.values()) / len(blocks), 6)
        left = [name for name, error in blocks.items() if error["after"] == error["before"]]
        if left:
            plan.notes.append(
                f"{len(left)} of {len(blocks)} blocks stayed as pruned, {left[0]} for one: training came no closer to "
                "the dense output; try another --reconstruct-learning-rate or more steps"
            )
    unseen = experts.unseen(facts)
    if unseen:
        result["unseen_experts"] = unseen
        plan.notes.append(experts.note(unseen, plan.options.method))
    return {**result, "notes": plan.notes}


def dry_run(plan: Plan, device: torch.device, progress: Progress) -> dict[str, Any]:
    """The plan as a result: every decision, bytes before and after, coverage, estimated peak memory and time."""
    modules = [
        {
            "name": d.name,
            "shape": list(d.shape),
            "pattern": d.pattern,
            "reason": d.reason,
            "dense_bytes": d.dense_bytes,
            "compressed_bytes": d.stored_bytes(plan.sparsity),
        }
        for d in plan.decisions.values()
    ]
    notes = list(plan.notes)
    if plan.options.pattern == AUTO:
        notes.append(
            "--pattern auto reads the zeros of each weight when it converts it; the bytes are those of bitmasks"
        )
    if any(d.pattern and d.nnz is None for d in plan.decisions.values()):
        notes.append(
            f"bytes after assume a sparsity of {plan.sparsity:g} where the zeros of the model decide; "
            "`sparse-rt inspect` on the source counts them"
        )
    if plan.runs_model and plan.options.dataset == selfgen.SELF:
        notes.append(
            f"--dataset self first runs the dense model as a whole, in {size(selfgen.model_bytes(plan.source))} of "
            "memory beside that of the process; what the parts below estimate comes after it"
        )
    if plan.options.ratios == "owl":
        weights = sum(plan.source.tensors[key].numel for keys in plan.blocks for key in keys)
        notes.append(
            f"--ratios owl first runs every block once over the calibration data, unpruned: the {weights:,} weights of "
            f"{len(plan.blocks)} blocks are read twice; the memory is that of pruning. Bytes of single weights will "
            "differ, their sum will not"
        )
    memory = estimated_memory(plan)
    progress.stage("timing this machine")
    seconds = timing.seconds(plan, window_length(plan), device, Path(plan.options.output_dir).absolute())
    if seconds is None:
        notes.append("the time is not estimated with --reconstruct, --permute and --dataset self")
    return {
        "dry_run": True,
        "source": source_facts(plan.source),
        "options": used_options(plan, None),
        "modules": modules,
        **plan.totals(),
        "skipped": plan.skipped(),
        "estimated_peak_memory_bytes": memory,
        "estimated_seconds": seconds,
        "needed_disk_bytes": disk_bytes(plan, plan.sparsity),
        "notes": notes,
    }


def estimated_memory(plan: Plan) -> dict[str, int]:
    """Parts and total of the expected peak; "process" is what Python and its libraries take already."""
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    parts = peak_memory(plan, window_length(plan))
    if plan.runs_model:
        now += RUNNING_BYTES
    return {"process": now, **parts, "total": now + sum(parts.values())}


def window_length(plan: Plan) -> int:
    """Tokens of a calibration sequence: ``max_seq_len``, or the positions of the model when it has fewer."""
    limit = plan.structure.max_positions
    return plan.options.max_seq_len if limit is None else min(plan.options.max_seq_len, limit)


def calibration_tokens(plan: Plan, progress: Progress) -> Tensor:
    """int64 [samples, length] from ``--dataset``; ``UserError`` when the model folder has no usable tokenizer."""
    options = plan.options
    try:
        tokenizer = load_tokenizer(plan.source.folder)
    except Exception as error:  # whatever transformers or tokenizers raise for missing or damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{_who(plan)} calibrates on text, and {plan.source.folder} has no tokenizer that loads ({reason}); "
            "copy its tokenizer files there, or use --method magnitude without --reconstruct, --permute and --ratios"
        ) from error
    length = noted_length(plan, progress)
    tokens = token_windows(read_texts(options.dataset, tokenizer), tokenizer, length, options.num_samples, options.seed)
    vocabulary = plan.structure.model.get_input_embeddings().num_embeddings
    if int(tokens.max()) >= vocabulary:
        raise UserError(
            f"the tokenizer of {plan.source.folder} gives token {int(tokens.max())}, the model knows {vocabulary}; "
            "the tokenizer belongs to another model"
        )
    return tokens


def sampled_tokens(plan: Plan, device: torch.device, partial: Path, progress: Progress) -> Tensor:
    """int64 [samples, length] that the model itself writes; without a shard, nothing is left behind by a failure."""
    try:
        return selfgen.self_tokens(plan, noted_length(plan, progress), device, partial, progress)
    except BaseException:
        if not (partial / JOURNAL_NAME).is_file():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def noted_length(plan: Plan, progress: Progress) -> int:
    length = window_length(plan)
    if length < plan.options.max_seq_len:
        plan.notes.append(f"calibration sequences have {length} tokens: the model has no more positions")
        progress.note(plan.notes[-1])
    return length


def _who(plan: Plan) -> str:
    if plan.pruner.needs_calibration:
        return plan.options.method
    if plan.options.reconstruct:
        return "--reconstruct"
    return "--permute" if plan.options.permute else "--ratios owl"


def parameter_loader(plan: Plan) -> Callable[[str], Tensor]:
    """Name of a parameter of the model -> its checkpoint tensor."""
    return lambda parameter: plan.structure.load(parameter, plan.source.load)


def stored_config(plan: Plan) -> dict[str, Any]:
    """config.json of the result, without quantization_config."""
    config = plan.source.config
    if plan.options.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = plan.options.dtype
    return config


def source_facts(source: Source) -> dict[str, Any]:
    return {"model": source.model, "revision": source.revision, "kind": source.kind, "digest": source.digest()}


def used_options(plan: Plan, tokens: Tensor | None) -> dict[str, Any]:
    """The options that shaped the result, for manifest and model card."""
    options = plan.options
    names = ["pattern", "method", "ignore", "overrides", "dtype"]
    unstructured = "unstructured" in (options.pattern, *options.overrides.values())
    if unstructured and options.method != "none":
        names.append("sparsity")
    used = {name: getattr(options, name) for name in names}
    if options.transposable:
        used["transposable"] = True
    if options.wrapper_block is not None:
        used["wrapper_block"] = options.wrapper_block
    if options.reconstruct:
        names = ("reconstruct", "reconstruct_learning_rate")
        used |= {name: getattr(options, name) for name in names}
    if options.ratios == "owl":
        spread, threshold = owl_setting(options)
        used |= {"ratios": options.ratios, "owl_lambda": spread, "owl_threshold": threshold}
    if options.permute:
        used["permute"] = True
    if plan.runs_model:
        used |= {"dataset": options.dataset or "shipped calibration text", "seed": options.seed}
        if options.dataset == selfgen.SELF:
            used["self_temperature"] = selfgen.temperature(plan)
        samples, length = (options.num_samples, window_length(plan)) if tokens is None else tokens.shape
        used |= {"num_samples": int(samples), "max_seq_len": int(length)}
    return used


def fingerprint(plan: Plan, tokens: Tensor | None, device: torch.device) -> str:
    """Digest of everything that decides the bytes written; a resumed run must have the same."""
    options = plan.options.model_dump(include=set(RELEVANT))
    options["max_shard_size"] = parse_size(options["max_shard_size"])
    data = {
        "options": options,
        "source": [str(Path(plan.source.folder).resolve()), plan.source.digest(), plan.source.file_times()],
        "tokens": None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "device": device.type,
        "versions": [__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
