"""What the arguments for vLLM's server say about what ``sparse-rt serve`` decides where they say nothing."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from sparse_rt.errors import UserError

_VALUES = (
    ("--model",),
    ("--revision",),
    ("--served-model-name",),
    ("--host",),
    ("--port",),
    ("--uds",),
    ("--config",),
    ("--quantization", "-q"),
    ("--gpu-memory-utilization",),
    ("--kv-cache-memory-bytes",),
    ("--tensor-parallel-size", "-tp"),
    ("--pipeline-parallel-size", "-pp"),
    ("--prefill-context-parallel-size", "-pcp"),
    ("--data-parallel-size", "-dp"),
    ("--data-parallel-size-local", "-dpl"),
)
# Several machines or servers, or a binding of vLLM's own: then only the user knows whose core is whose.
_PLACED_BY_USER = (
    ("--nnodes", "-n"),
    ("--node-rank", "-r"),
    ("--headless",),
    ("--data-parallel-rank", "-dpn"),
    ("--data-parallel-start-rank", "-dpr"),
    ("--data-parallel-address", "-dpa"),
    ("--data-parallel-backend", "-dpb"),
    ("--data-parallel-hybrid-lb", "-dph"),
    ("--data-parallel-external-lb", "-dpe"),
    ("--data-parallel-multi-port-external-lb", "-dpm"),
    ("--distributed-executor-backend",),
    ("--numa-bind",),
    ("--numa-bind-nodes",),
    ("--numa-bind-cpus",),
)
# Given or not; a --no- form is the same as saying nothing.
_SWITCHES = (("--enable-expert-parallel", "-ep"),)


class ServeArguments:
    """``ServeArguments(vllm_args)["--port"]`` is the text given for an option, None where it is not given.

    Reads the spellings that vLLM reads: underscores, ``=``, short names and a ``--config`` file of defaults.
    ``UserError`` for an option without its value and for a file that cannot be read.
    """

    def __init__(self, vllm_args: Iterable[str]):
        args = [_dashes(arg) for arg in vllm_args]
        file = _parse(args).config
        self._given = _parse([*_config_file(file), *args] if file else args)

    def __getitem__(self, option: str) -> str | None:
        return getattr(self._given, option.lstrip("-").replace("-", "_"))

    def any_of(self, *options: str) -> bool:
        return any(self[option] is not None for option in options)

    def placed_by_user(self) -> str | None:
        """The first option by which the user spreads vLLM over machines, servers or memory nodes, else None."""
        return next((names[0] for names in _PLACED_BY_USER if self[names[0]] is not None), None)

    @property
    def expert_parallel(self) -> bool:
        """Whether experts are shared out whole."""
        return self["--enable-expert-parallel"] is not None

    def ranks(self) -> int:
        """Worker processes that compute: data x pipeline x prefill context x tensor parallel sizes."""
        data = self.size("--data-parallel-size-local") or self.size("--data-parallel-size") or 1
        for option in ("--tensor-parallel-size", "--pipeline-parallel-size", "--prefill-context-parallel-size"):
            data *= self.size(option) or 1
        return data

    def size(self, option: str) -> int | None:
        """A whole number from 1 on, None where it is not given; ``UserError`` for anything else."""
        text = self[option]
        if text is None:
            return None
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"{option} {text}: give a whole number from 1 on")
        return int(text)


def _dashes(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if arg.startswith("--") else arg


def _parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names in _VALUES:
        parser.add_argument(*names)
    for names in (*_PLACED_BY_USER, *_SWITCHES):
        parser.add_argument(*names, nargs="?", const="")
    try:
        return parser.parse_known_args(args)[0]
    except argparse.ArgumentError as error:
        raise UserError(f"vLLM's arguments: {error}") from error


def _config_file(file: str) -> list[str]:
    """The options of a ``--config`` file that hold one value; all that are read here do."""
    try:
        options: Any = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise UserError(f"--config {file} is no list of options; write one `option: value` a line")
    plain = {
        key: value for key, value in options.items() if isinstance(value, str | int | float) and value is not False
    }
    return [_dashes(f"--{key}") if value is True else _dashes(f"--{key}={value}") for key, value in plain.items()]
