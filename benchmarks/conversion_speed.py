"""MB/s of dense model that `convert --method none` packs, a core, and what it consists of.

    cd benchmarks
    python conversion_speed.py --workdir /tmp/conversion --output results/conversion_speed.jsonl    # 3 minutes

The model is a random Llama of 1 GB (random_llama.py), its weights set to zero at 2:4, 50 % or 70 % before; files lie in
the page cache. ``wall`` is the whole conversion as a user waits for it, after a small one that loads what is loaded
when first used; ``cpu`` is the processor time of the process: all of its threads, hence "a core". The result is read
back and compared with the source bit for bit. One JSON row per pattern, the best of ``--repeats``.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click
import torch
from random_llama import Shape, dense_folder
from safetensors.torch import load_file, save_file

from sparse_rt.benchmarking.machine import Neighbours, commit, cpu_name
from sparse_rt.checkpoint import Checkpoint, SourceCheckpoint, output_directory
from sparse_rt.config import ConvertOptions
from sparse_rt.formats import get_format
from sparse_rt.progress import Progress
from sparse_rt.workflows.convert import convert

CELLS = (("2:4", 0.5), ("unstructured", 0.5), ("unstructured", 0.7))
MODEL = Shape(10, 2048, 5632, 32, 8, 32000, 2048)
TINY = Shape(2, 64, 160, 4, 2, 4096, 256)


def pruned_folder(workdir: Path, shape: Shape, pattern: str, sparsity: float) -> Path:
    """The dense model with zeros, stored dense; made when it is not there yet."""
    dense = dense_folder(workdir, shape, Progress())
    folder = workdir / f"{shape.name}-zeros-{pattern.replace(':', 'of')}-{sparsity:g}"
    if folder.is_dir():
        return folder
    fmt = get_format(pattern)
    with output_directory(folder) as partial:
        for file in dense.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, partial / file.name)
                continue
            tensors = load_file(file)
            for name in (name for name in tensors if name.endswith("_proj.weight")):
                mask = fmt.mask_from_scores(tensors[name].float().abs(), sparsity)
                tensors[name] = torch.where(mask, tensors[name], 0)
            save_file(tensors, partial / file.name, metadata={"format": "pt"})
    return folder


def check(source: Path, result: Path) -> None:
    """``ClickException`` unless every compressed weight is that of the source."""
    dense, sparse = SourceCheckpoint.open(source), Checkpoint.open(result)
    for name, entry in sparse.weights.items():
        values, metadata = sparse.load_weight(name)
        back = get_format(entry.pattern).decompress(values, metadata, entry.m, entry.n)
        if not torch.equal(back, dense.load(f"{name}.weight")):
            raise click.ClickException(f"{name} does not come back; nothing was timed")


def measure(source: Path, room: Path, pattern: str, repeats: int) -> dict[str, Any]:
    found = []
    for number in range(repeats):
        options = ConvertOptions(model=str(source), output_dir=room / "out", method="none", pattern=pattern)
        options = options.model_copy(update={"overwrite": True})
        neighbours, wall, cpu = Neighbours(), time.perf_counter(), time.process_time()
        result = convert(options)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        found.append({"cpu": cpu, "wall": wall, "busy_cores": neighbours.busy_cores()})
        if number == 0:
            check(source, room / "out")
    best, megabytes = min(found, key=lambda sample: sample["cpu"]), result["dense_bytes"] / 1e6
    return {
        "mb": round(megabytes, 1),
        "ratio": result["ratio"],
        "wall_seconds": round(best["wall"], 3),
        "cpu_seconds": round(best["cpu"], 3),
        "mb_per_second": round(megabytes / best["wall"], 1),
        "mb_per_core_second": round(megabytes / best["cpu"], 1),
        "busy_cores": best["busy_cores"],
    }


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--workdir", type=click.Path(path_type=Path), required=True, help="folder for the models, which stay")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines, appended to")
@click.option("--threads", multiple=True, type=int, default=(1,), show_default=True, help="of torch")
@click.option("--repeats", default=3, show_default=True)
@click.option("--small", is_flag=True, help="a tiny model, to see that it runs")
def main(workdir: Path, output: Path | None, threads: tuple[int, ...], repeats: int, small: bool) -> None:
    where = {"processor": cpu_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    shape = TINY if small else MODEL
    for pattern, sparsity in CELLS:
        source, tiny = (pruned_folder(workdir, one, pattern, sparsity) for one in (shape, TINY))
        for count in threads:
            torch.set_num_threads(count)
            room = workdir / "room"
            measure(tiny, room, pattern, 1)
            row = {"pattern": pattern, "sparsity": sparsity, "threads": count, "repeats": repeats}
            row |= measure(source, room, pattern, repeats) | where
            shutil.rmtree(room)
            click.echo(json.dumps(row))
            if output is not None:
                with output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
