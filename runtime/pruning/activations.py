"""Where the activations of the calibration sequences rest between blocks: one tensor, or a file without a name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparse_rt.errors import SparseRTError


class Activations:
    """``count`` tensors of one shape and dtype, those of the first one set; each is replaced in place.

    Their dtype is the one that the blocks hand on: bfloat16 of a bfloat16 model, float32 of a float32 model, whose
    masks would change if its activations were rounded between blocks. Should a later block hand on a wider dtype, all
    are widened.

    With ``folder`` they lie in a file there that never has a name, so nothing stays behind however the process ends. It
    is read and written, not mapped: mapped pages count as memory of the process, and a full disk would end it by a
    signal. The room is taken at once, so that a full disk shows before the work.
    """

    def __init__(self, count: int, folder: Path | None = None):
        self.count, self.folder = count, folder
        self._memory: Tensor | None = None
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(self.count))

    def __getitem__(self, index: int) -> Tensor:
        """What was set last under ``index``; on the CPU."""
        if self._memory is not None:
            return self._memory[index]
        return self._transfer(os.preadv, torch.empty(self._shape, dtype=self._dtype), index)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        if self._shape is None:
            self._allocate(tensor.shape, tensor.dtype)
        if tensor.shape != self._shape:
            raise SparseRTError(
                f"a block turned activations of the shape {tuple(self._shape)} into {tuple(tensor.shape)}; blocks that "
                "change the shape cannot be calibrated one by one, use --method magnitude"
            )
        wider = torch.promote_types(tensor.dtype, self._dtype)
        if wider != self._dtype:
            self._widen(wider)
        if self._memory is not None:
            self._memory[index] = tensor
        else:
            self._transfer(os.pwritev, tensor.detach().cpu().to(self._dtype).contiguous(), index)

    def copy(self) -> Activations:
        """The same activations in a place of their own."""
        other = Activations(self.count, self.folder)
        for index, tensor in enumerate(self):
            other[index] = tensor
        return other

    def _allocate(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        if self._file is None:
            self._memory = torch.zeros(self.count, *shape, dtype=dtype)
            return
        nbytes = self.count * shape.numel() * dtype.itemsize
        try:
            os.posix_fallocate(self._file.fileno(), 0, nbytes)
        except OSError as error:
            raise SparseRTError(
                f"the activations of {self.count} calibration sequences take {nbytes:,} bytes, which {self.folder} has "
                f"no room for ({error.strerror}); make room, lower --num-samples, or leave out --offload-activations"
            ) from error

    def _widen(self, dtype: torch.dtype) -> None:
        wider = Activations(self.count, self.folder)
        wider._allocate(self._shape, dtype)
        for index, tensor in enumerate(self):
            wider[index] = tensor
        self._memory, self._file, self._dtype = wider._memory, wider._file, dtype

    def _transfer(self, call, tensor: Tensor, index: int) -> Tensor:
        """Read into or write from ``tensor``; the system may move less than asked for at a time."""
        view, done = memoryview(tensor.view(torch.uint8).numpy()).cast("B"), 0
        while done < len(view):
            moved = call(self._file.fileno(), [view[done:]], index * len(view) + done)
            if moved == 0:
                raise SparseRTError(f"the file with the activations in {self.folder} is shorter than it was")
            done += moved
        return tensor
