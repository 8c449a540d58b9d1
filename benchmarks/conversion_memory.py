"""Peak memory and time of conversions against what --dry-run says, for models of 8, 16 and 32 blocks of one width.

    cd benchmarks
    python conversion_memory.py --workdir /tmp/conversion --output results/conversion.jsonl     # a quarter of an hour
    python conversion_memory.py --plot results/conversion_memory.png --output results/conversion.jsonl --layers 0

The models are random Llamas (random_llama.py), 1024 wide and 2816 in the MLP. Every conversion has a process of its
own, which first converts a tiny model, so that what libraries load and keep is not counted: "peak" is the highest
resident memory, mapped files included, over what the process had then. "bar" is the largest block and the activations,
where the model runs, and one shard, and 15 % more. (No shard is held; what is held besides, the statistics and the work
on one weight, is in "estimate".) The estimated seconds are those of --dry-run in the same process just after.

One JSON row per method and number of blocks. ``--plot`` draws all rows of the output file.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click
import torch
from random_llama import Shape, dense_folder

from sparse_rt.benchmarking.machine import Neighbours, commit, cpu_name
from sparse_rt.benchmarking.processes import reset_peak, status_bytes
from sparse_rt.config import ConvertOptions, parse_size
from sparse_rt.conversion.memory import release
from sparse_rt.progress import Progress
from sparse_rt.workflows.convert import convert

METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
TINY = Shape(2, 64, 160, 4, 2, 4096, 256)
BAR = ("block", "activations")  # and one shard


def shape_of(layers: int) -> Shape:
    return Shape(layers, 1024, 2816, 16, 4, 4096, 1024)


def measure(model: str, tiny: str, method: str, options: dict[str, Any], threads: int) -> dict[str, Any]:
    """Convert ``model`` in this process, which is fresh; what it took and what was estimated."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=Path(model).parent) as room:
        given = dict(method=method, **options)
        convert(ConvertOptions.build(model=tiny, output_dir=Path(room) / "tiny", **given))
        wanted = ConvertOptions.build(model=model, output_dir=Path(room) / "out", **given)
        gc.collect()
        release()
        before, neighbours = status_bytes("VmRSS"), Neighbours()
        reset_peak()
        done = convert(wanted)
        peak, busy = status_bytes("VmHWM") - before, neighbours.busy_cores()
        planned = convert(wanted.model_copy(update={"dry_run": True, "overwrite": True}))
    parts = {name: size for name, size in planned["estimated_peak_memory_bytes"].items() if name != "total"}
    process = parts.pop("process")
    shard = min(parse_size(wanted.max_shard_size), planned["compressed_bytes"])
    return {
        "method": method,
        "threads": threads,
        "peak": peak,
        "estimate": sum(parts.values()),
        "parts": parts,
        "bar": round(1.15 * (shard + sum(parts.get(name, 0) for name in BAR))),
        "shard": shard,
        "process": before,
        "estimated_process": process,
        "seconds": done["seconds"],
        "estimated_seconds": planned["estimated_seconds"],
        "dense_bytes": done["dense_bytes"],
        "busy_cores": busy,
    }


def run_fresh(*arguments: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Peak, estimate and bar by the number of blocks, a panel a method; the newest row of each counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    newest = {(row["method"], row["offload"], row["layers"]): row for row in rows}
    kinds = sorted({key[:2] for key in newest}, key=lambda kind: (kind[1], METHODS.index(kind[0])))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(3.4 * len(kinds), 3.6), squeeze=False)
    for axis, (method, offload) in zip(axes[0], kinds, strict=True):
        mine = sorted((row for key, row in newest.items() if key[:2] == (method, offload)), key=lambda r: r["layers"])
        layers = [row["layers"] for row in mine]
        axis.plot(layers, [row["dense_bytes"] / 1e6 for row in mine], ":", color="0.6", label="dense model")
        axis.plot(layers, [row["estimate"] / 1e6 for row in mine], "--", color="C1", label="estimate of --dry-run")
        axis.plot(
            layers, [row["bar"] / 1e6 for row in mine], "-.", color="C2", label="block + activations + shard, +15 %"
        )
        axis.plot(layers, [row["peak"] / 1e6 for row in mine], "o-", color="C0", label="measured peak")
        axis.set(title=f"{method}{', activations on disk' if offload else ''}", xlabel="decoder blocks", xticks=layers)
        axis.set_ylim(0, 2.2 * max(row["peak"] for row in mine) / 1e6)
    axes[0][0].set_ylabel("MB over the process before")
    axes[0][-1].legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--workdir", type=click.Path(path_type=Path), help="folder for the models, which stay there")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines, appended to")
@click.option("--layers", multiple=True, type=int, default=(8, 16, 32), show_default=True, help="0: none, to plot only")
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), default=METHODS[:3], show_default=True)
@click.option("--num-samples", default=16, show_default=True)
@click.option("--max-seq-len", default=256, show_default=True)
@click.option("--max-shard-size", default="100MB", show_default=True)
@click.option("--offload", is_flag=True, help="activations on disk")
@click.option("--threads", default=1, show_default=True)
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="draw the rows of --output")
@click.option("--child", hidden=True)
def main(workdir, output, layers, methods, threads, offload, plot_path, child, **options):
    if child is not None:
        click.echo(json.dumps(measure(*json.loads(child))))
        return
    options["offload_activations"] = offload
    where = {"cpu": cpu_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    for count in (count for count in layers if count):
        model, tiny = (dense_folder(workdir, shape, Progress()) for shape in (shape_of(count), TINY))
        for method in methods:
            row = run_fresh(str(model), str(tiny), method, options, threads)
            row = {"layers": count, "offload": offload, **options, **row, **where}
            click.echo(json.dumps(row))
            if output is not None:
                with output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if plot_path is not None:
        plot([json.loads(line) for line in output.read_text().splitlines()], plot_path)


if __name__ == "__main__":
    main()
