"""Model folders whose weights are torch pickles (``pytorch_model.bin``), read without running anything in them."""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparse_rt.checkpoint import semi_structured
from sparse_rt.checkpoint.reader import read_json
from sparse_rt.errors import FormatError, UserError

NAME, INDEX_NAME = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SUFFIXES = (".bin", ".pt", ".pth")
# What trainers leave beside the weights.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")


@dataclass(frozen=True)
class PickledTensor:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    semi_structured: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def pickled_files(folder: Path) -> list[Path]:
    """The weight files of ``folder``: those of the index, ``pytorch_model.bin``, or the only one; [] where none is.

    Raises ``FormatError`` for a file that the index names and that is missing, ``UserError`` when it is not clear which
    file holds the weights.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise FormatError(f"{index}: weight_map names no file for every tensor; copy the model again")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FormatError(f"{INDEX_NAME} names {missing[0]}, which is not in {folder}; copy the model again")
        return [folder / name for name in names]
    if (folder / NAME).is_file():
        return [folder / NAME]
    found = [f for f in sorted(folder.iterdir()) if f.suffix in _SUFFIXES and not _NO_WEIGHTS.fullmatch(f.name)]
    if len(found) > 1:
        raise UserError(
            f"{folder} holds {len(found)} pickled files ({found[0].name}, {found[1].name}, ...) and no {INDEX_NAME}; "
            f"name the one with the weights {NAME}"
        )
    return found


class PickledCheckpoint:
    """The tensors of such a folder. Files are mapped: listing them reads no data, loading reads that of one tensor."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, read_json(folder / "config.json")
        self.files = pickled_files(folder)
        self.tensors: dict[str, PickledTensor] = {}
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        tied = self.config.get("tie_word_embeddings") is True
        for file in self.files:
            seen: set[tuple[int, torch.Size]] = set()
            for name, tensor in self._state(file).items():
                if name in self.tensors:
                    raise FormatError(f"tensor {name} is in {self.tensors[name].file.name} and in {file.name}")
                special = semi_structured.is_semi_structured(tensor)
                if special:
                    semi_structured.check(name, tensor)
                elif tied and tensor.numel():  # pickles name a tied head beside the embedding whose storage it shares
                    place = tensor.data_ptr(), tensor.shape
                    if place in seen:
                        continue
                    seen.add(place)
                self.tensors[name] = PickledTensor(file, tensor.dtype, tuple(tensor.shape), special)

    def _state(self, file: Path) -> dict[str, Tensor]:
        """The state dict in ``file``; the one opened last is kept."""
        if self._open is None or self._open[0] != file:
            self._open = None  # never two of them
            self._open = file, read_state_dict(file)
        return self._open[1]

    def stored(self, name: str) -> Tensor:
        """The tensor as it was saved, possibly semi-structured."""
        if name not in self.tensors:
            raise FormatError(f"tensor {name} is missing in {self.folder}")
        return self._state(self.tensors[name].file)[name]

    def load(self, name: str) -> Tensor:
        """One tensor, dense and in memory of its own."""
        stored = self.stored(name)
        return semi_structured.dense(stored) if self.tensors[name].semi_structured else stored.detach().clone()

    def mask(self, name: str) -> Tensor | None:
        """The mask of a semi-structured tensor, None for any other."""
        return semi_structured.mask(name, self.stored(name)) if self.tensors[name].semi_structured else None

    @property
    def total_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def digest(self) -> str:
        """sha256 over config.json and, of every file, its pickle without the data: names, dtypes and shapes."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in self.files:
            digest.update(file.name.encode() + _structure(file))
        return digest.hexdigest()


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Name -> tensor, mapped where the file allows it; builds tensors and ``semi_structured.CLASSES``, nothing else.

    ``FormatError`` for a damaged file, ``UserError`` for one with anything but tensors in it.
    """
    try:
        with torch.serialization.safe_globals(list(semi_structured.CLASSES)):
            # Files from before torch 1.6 are no archives and cannot be mapped: such a file is read as a whole.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # pickle, zip, torch and the operating system each raise their own
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise UserError(
                f"{file.name} holds an object of {found[1]}, and of a pickle sparse-rt reads tensors only; save the "
                "weights as plain tensors, better as safetensors"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{file.name} is no file of torch.save, or damaged ({reason}); copy it again") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise UserError(f"{file.name} holds {type(state).__name__}, not a state dict; save model.state_dict()")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{file.name}: {name!r} is {type(tensor).__name__}, not a tensor; save model.state_dict()")
    return state


def _structure(file: Path) -> bytes:
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            return stream.read(1 << 20)
    with zipfile.ZipFile(file) as archive:
        return b"".join(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
