"""``sparse-rt finetune``: train an adapter on a compressed model; the adapter folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_rt.checkpoint import Checkpoint, check_output, is_sparse_checkpoint, output_directory, resolve_model
from sparse_rt.config import FinetuneOptions
from sparse_rt.errors import UserError
from sparse_rt.optional import require
from sparse_rt.progress import Progress

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def finetune(options: FinetuneOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Train ``options.adapter`` on ``options.model`` and write the adapter folder.

    Works under ``accelerate launch`` too: every process trains, the first one writes. Raises ``UserError`` for a dense
    model, data or options that cannot work, before training starts; an interruption leaves checkpoints for
    ``--resume``, which ends with the same bits as an uninterrupted run.
    """
    progress = progress or Progress()
    output = check_output(options.output_dir, options.overwrite)
    folder = resolve_model(options.model, options.revision)
    if not is_sparse_checkpoint(folder):
        raise UserError(
            f"{options.model} is a dense model; adapters train on compressed weights, make them first: "
            f"sparse-rt convert {options.model} -o {Path(options.model).name}-sparse"
        )
    if folder.resolve() == output.resolve():
        raise UserError(f"the output folder {output} holds the base model; choose another output folder")
    if options.previous is not None and Path(options.previous).resolve() == output.resolve():
        raise UserError(f"the output folder {output} holds the earlier adapter; choose another output folder")
    checkpoint = Checkpoint.open(folder)
    checkpoint.quantization.refuse_wrapper("no adapter can be trained on")
    for package in ("peft", "accelerate", "datasets"):
        require(package, extra="train")
    from sparse_rt.training.checkpoints import refuse_unfinished, working_folder

    work = working_folder(output)
    refuse_unfinished(work, options.resume, options.overwrite)
    writes = int(os.environ.get("RANK", "0")) == 0
    with _output(output, options.overwrite, writes) as partial:
        result = _run(options, checkpoint, work, partial, progress)
    if writes:
        shutil.rmtree(work)
    return {"output_dir": str(output), **result}


@contextlib.contextmanager
def _output(output: Path, overwrite: bool, writes: bool) -> Iterator[Path | None]:
    if not writes:
        yield None
        return
    with output_directory(output, overwrite) as partial:
        yield partial


def _run(
    options: FinetuneOptions, checkpoint: Checkpoint, work: Path, partial: Path | None, progress: Progress
) -> dict[str, Any]:
    from transformers import set_seed

    from sparse_rt.adapters.registry import get_adapter
    from sparse_rt.hf.load import load_generator
    from sparse_rt.training import checkpoints, digest, run
    from sparse_rt.training.dataset import refuse_leaking, training_data
    from sparse_rt.training.distillation import described, recipe_of
    from sparse_rt.training.options import adapter_config, training_arguments
    from sparse_rt.training.previous import open_previous

    adapter = get_adapter(options.adapter)
    config = adapter_config(adapter, options.adapter_options)
    evaluates = options.eval_dataset is not None or options.eval_fraction > 0
    arguments = training_arguments(work, adapter, options.seed, options.trainer, evaluates)
    progress.stage("reading data")
    if options.dataset is None:
        progress.note("no dataset given: training on the Python sources that ship with sparse-rt, meant for trying out")
    data = training_data(options, checkpoint, progress)
    digests = {"base": digest.base_digest(checkpoint), "data": data.digest}
    previous = open_previous(options.previous, adapter, checkpoint, digests["base"])
    digests["previous"] = previous and previous.digest()
    recipe = recipe_of(options)
    digests["teaching"] = described(recipe)
    identity = _identity(options, data.max_seq_len, digests)
    resumed = checkpoints.prepare(work, identity, options.resume, partial is not None)
    if options.resume:
        progress.note(f"resuming from {resumed.name}" if resumed else "nothing to resume: starting from the beginning")
    progress.stage("loading the model")
    set_seed(options.seed)
    base = load_generator(checkpoint.folder)
    model = run.attach(base, config, _base_name(options), options.revision, digests["base"], previous)
    if options.packing:
        refuse_leaking(model)
    distillation = None if recipe is None else _teaching(options, recipe, checkpoint, data, arguments, progress)
    trained = run.train(model, data, arguments, resumed, progress, distillation)
    trained.trainer.save_model(str(work / "final"))
    result = _result(options, data, digests, trained, resumed)
    if partial is not None:
        _write(partial, options, data.max_seq_len, trained, result, work)
    return result


def _result(options: FinetuneOptions, data, digests: dict[str, Any], trained, resumed: Path | None) -> dict[str, Any]:
    from sparse_rt.training import run

    return {
        "model": options.model,
        "adapter": options.adapter,
        "dataset": options.dataset or "shipped fine-tuning text",
        "rows": len(data.train),
        "eval_rows": len(data.evaluation) if data.evaluation is not None else 0,
        "base_digest": digests["base"],
        "previous": options.previous,
        "previous_digest": digests["previous"],
        **({"distillation": digests["teaching"]} if digests["teaching"] else {}),
        "trainable_parameters": run.trainable_parameters(trained.trainer.model),
        "steps": trained.steps,
        "first_loss": round(trained.first_loss, 6),
        "last_loss": round(trained.last_loss, 6),
        "losses": trained.losses,
        **trained.evaluation(),
        "tokens": trained.tokens,
        "seconds": round(trained.seconds, 3),
        "tokens_per_second": round(trained.tokens / trained.seconds, 1),
        **run.peak_memory(),
        "device": str(trained.trainer.args.device),
        "processes": trained.trainer.args.world_size,
        "resumed_from": resumed.name if resumed else None,
    }


def _teaching(options: FinetuneOptions, recipe, checkpoint: Checkpoint, data, arguments, progress: Progress):
    """The loss against a dense teacher; where its outputs are cached, the first process makes the cache."""
    from sparse_rt.training.distillation import distillation
    from sparse_rt.training.run import Collator

    with arguments.main_process_first(local=False, desc="teacher"):
        collate = Collator(data.pad_token_id)
        return distillation(options, recipe, checkpoint, data.train, collate, arguments.device, progress)


def _identity(options: FinetuneOptions, length: int, digests: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the bits of the result; a resumed run must have the same."""
    return {
        "adapter": options.adapter,
        **{f"adapter option {name}": value for name, value in options.adapter_options.items()},
        **{f"training option {name}": value for name, value in options.trainer.items()},
        "max_seq_len": length,
        "seed": options.seed,
        "model": digests["base"],
        "dataset": digests["data"],
        "previous": digests["previous"],
        **{f"teacher: {name}": value for name, value in digests["teaching"].items()},
        "number of processes": os.environ.get("WORLD_SIZE", "1"),
    }


def _base_name(options: FinetuneOptions) -> str:
    path = Path(options.model)
    return str(path.resolve()) if path.is_dir() else options.model


def _write(partial: Path, options: FinetuneOptions, length: int, trained, result, work: Path) -> None:
    """Fill the adapter folder; it is renamed into place after this."""
    from sparse_rt.adapters.registry import get_adapter
    from sparse_rt.training import record
    from sparse_rt.training.options import resolved

    for name in ADAPTER_FILES:
        shutil.copyfile(work / "final" / name, partial / name)
    trained.trainer.state.save_to_json(str(partial / "trainer_state.json"))
    told = options.model_dump(mode="json", exclude={"resume", "overwrite"})
    adapter, evaluates = get_adapter(options.adapter), bool(trained.eval_losses)
    told |= {"max_seq_len": length, "trainer": resolved(adapter, options.trainer, evaluates)}
    record.write_run_file(partial, told)
    record.write_card(partial, options.output_dir.name, options.model, result)
    record.write_metrics(partial, result)
    record.write_loss_curve(partial, trained.losses, trained.eval_losses)
