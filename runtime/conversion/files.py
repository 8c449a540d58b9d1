"""Everything of a model folder that is not a weight: copied as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

from sparse_rt.errors import UserError

# Weights in any form, descriptions of them, and what is written anew.
_SKIPPED_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".npz"),
    *(".ot", ".tflite", ".tmp", ".lock"),
}
_SKIPPED_NAMES = {"config.json", "README.md", "progress.json", "sparse_rt.manifest.json"}


def copy_small_files(source: Path, output: Path) -> list[str]:
    """Tokenizer, generation config, chat template, licence and the like, from the top level of ``source``."""
    copied = []
    for file in sorted(source.iterdir()):
        skipped = file.name in _SKIPPED_NAMES or file.suffix in _SKIPPED_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not skipped and not file.name.startswith("."):
            shutil.copyfile(file, output / file.name)
            copied.append(file.name)
    return copied


def refuse_same_folder(source: Path, output: Path) -> None:
    """``UserError`` when writing ``output`` would replace the model it is made from."""
    source, output = source.resolve(), output.resolve()
    if source == output or output in source.parents:
        raise UserError(f"the output folder {output} holds the source model; choose another output folder")
