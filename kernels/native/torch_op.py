"""Hand the functions of torch to csrc/torch_op.c, which registers the kernel of ``packed_linear`` in the dispatcher."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from sparse_rt.errors import BackendError

# In the order of the table in csrc/torch_op.c. An entry with several names takes the first that this torch has: the C
# function of newer releases, then the C++ function (or operator delete) that it is made of.
NAMES = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_numel",
    "aoti_torch_get_dtype",
    "aoti_torch_empty_strided",
    "aoti_torch_new_tensor_handle",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_call_dispatcher",
    "aoti_torch_memory_format_contiguous_format",
    "aoti_torch_device_type_cpu",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float16",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_uint8",
    "aoti_torch_library_init_impl",
    "aoti_torch_library_impl",
    "aoti_torch_delete_library_object",
    "_ZN2at15get_num_threadsEv",
    "_ZN3c106detail14torchCheckFailEPKcS2_jS2_",
    "torch_delete_stable_ivalue _ZdlPv",
)
LIBRARY = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"

_registered: ctypes.CDLL | None = None


def register(handle: ctypes.CDLL) -> None:
    """Make the product of ``handle`` the CPU kernel; ``BackendError`` where this torch lacks a function it needs.

    A library that was registered before gives way, so that the kernels can be loaded again.
    """
    global _registered
    path = Path(torch.__file__).parent / "lib" / LIBRARY
    try:
        source = ctypes.CDLL(str(path))
        addresses = [_address(source, names.split()) for names in NAMES]
    except (OSError, AttributeError) as error:
        raise BackendError(f"torch {torch.__version__} lacks what its dispatcher is reached with ({error})") from error
    if _registered is not None:
        _registered.srt_torch_unregister()
        _registered = None
    if handle.srt_torch_register((ctypes.c_void_p * len(addresses))(*addresses)) != 0:
        raise BackendError(f"torch {torch.__version__} does not take the kernel of packed_linear")
    _registered = handle


def _address(source: ctypes.CDLL, names: list[str]) -> int:
    for name in names[:-1]:
        if hasattr(source, name):
            return ctypes.cast(getattr(source, name), ctypes.c_void_p).value
    return ctypes.cast(getattr(source, names[-1]), ctypes.c_void_p).value
