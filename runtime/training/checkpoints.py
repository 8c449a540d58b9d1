"""The working folder of a run: Trainer checkpoints that are known to be whole, and what they belong to.

It lies beside the output (``.NAME.training``) and goes away after the adapter has been published, so a crash at any
moment leaves either the whole adapter or the checkpoints to go on from.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sparse_rt.checkpoint import read_json, write_json
from sparse_rt.checkpoint.output import fsync
from sparse_rt.errors import UserError

RUN_NAME = "run.json"
# Written last into a checkpoint: a kill while the Trainer writes leaves a folder without it.
COMPLETE_NAME = "complete"


def working_folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.training")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    if not folder.is_dir():
        return None
    steps = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / COMPLETE_NAME).is_file()
    }
    return steps[max(steps)] if steps else None


def refuse_unfinished(folder: Path, resume: bool, overwrite: bool) -> None:
    """``UserError`` when starting over would throw checkpoints away and nobody said so."""
    found = None if resume or overwrite else last_checkpoint(folder)
    if found is not None:
        raise UserError(
            f"an interrupted run left {found}; pass --resume to go on from it, or --overwrite to start again"
        )


def prepare(folder: Path, run: dict[str, Any], resume: bool, writes: bool) -> Path | None:
    """Make the working folder ready and return the checkpoint to go on from.

    ``run`` is everything that decides the result; an unfinished run that differs in it is refused by name. Only the
    process that ``writes`` changes anything.
    """
    run = json.loads(json.dumps(run, default=str))
    found = last_checkpoint(folder) if resume else None
    if found is not None:
        before = read_json(folder / RUN_NAME)
        changed = sorted(key for key in run.keys() | before.keys() if run.get(key) != before.get(key))
        if changed:
            raise UserError(
                f"cannot resume {folder}: it was started with other values of {', '.join(changed)}; "
                "give the same options, or --overwrite to start again"
            )
    elif writes:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / RUN_NAME, run)
    return found


class MarkComplete(TrainerCallback):
    """Marks a checkpoint once the Trainer has written all of it."""

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():  # every process writes its random numbers into the checkpoint
            torch.distributed.barrier()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            for file in folder.rglob("*"):
                fsync(file)
            (folder / COMPLETE_NAME).touch()
