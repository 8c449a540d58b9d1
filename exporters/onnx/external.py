"""The data file beside ``model.onnx``: reading an initializer wherever its data lie, and writing one.

Nothing here knows the package's own operators or checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import TensorProto, external_data_helper, numpy_helper

DATA_NAME = "model.onnx.data"
# ONNX Runtime maps the data file into memory, page by page.
PAGE = 4096


def loaded(tensor: TensorProto, folder: Path) -> TensorProto:
    """A copy of initializer ``tensor`` of the model in ``folder``, with its data inside."""
    copy = TensorProto()
    copy.CopyFrom(tensor)  # the data goes with the copy, not with the model
    if external_data_helper.uses_external_data(copy):
        external_data_helper.load_external_data_for_tensor(copy, str(folder))
    return copy


def read(tensor: TensorProto, folder: Path) -> np.ndarray:
    """What initializer ``tensor`` of the model in ``folder`` holds."""
    return numpy_helper.to_array(loaded(tensor, folder))


def store(tensor: TensorProto, raw: bytes | memoryview, data: BinaryIO) -> TensorProto:
    """Give ``tensor``, which has name, type and dims so far, its little-endian bytes ``raw``; returns it.

    They go to the next page of the data file ``data``, less than a page into the tensor itself.
    """
    if len(raw) < PAGE:
        tensor.raw_data = bytes(raw)
        return tensor
    data.write(bytes(-data.tell() % PAGE))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": DATA_NAME, "offset": data.tell(), "length": len(raw)}.items():
        tensor.external_data.add(key=key, value=str(value))
    data.write(raw)
    return tensor
