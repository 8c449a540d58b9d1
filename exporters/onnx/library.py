"""The operators of domain ``sparse_rt`` as a library for ONNX Runtime: compiled at first use, like the native kernels.

It is made of csrc/ here and the row kernels of kernels/native/csrc, needs neither headers nor libraries of ONNX Runtime
and works with every release from 1.17 on. Without it a session runs the functions in the file instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

from sparse_rt.errors import BackendError
from sparse_rt.kernels.native import build
from sparse_rt.kernels.native.library import ISA_VARIABLE, ISAS

FILE_NAME = "libsparse_rt_ort.so"
# Decompressing a row is the same work wherever it is done: these files of the native kernels are compiled in.
SHARED_SOURCES = ("scalar.c", "avx2.c", "avx512.c")


@functools.cache
def path() -> Path:
    """The compiled library; ``BuildError`` (one sentence with the remedy) where there is none."""
    compiler = build.find_compiler()
    identity = build.compiler_identity(compiler)
    with _sources() as (own, shared):
        flags = [*build.FLAGS, f"-I{shared}"]
        headers = [*own.glob("*.h"), *shared.glob("*.h")]
        sources = [*sorted(own.glob("*.c")), *(shared / name for name in SHARED_SOURCES)]
        # The path of the headers is no part of the key: their contents are.
        key = build.cache_key([*sorted(headers), *sources], identity, list(build.FLAGS))
        return build.cached("onnx", f"sparse_rt_ort-{key}", compiler, flags, sources)


def unavailable_reason() -> str | None:
    """None, or why operators run as the functions of the file here."""
    try:
        path()
    except build.BuildError as error:
        return str(error)
    return None


def isa() -> str:
    """The instruction set that the operators use on this machine: scalar, avx2 or avx512."""
    return _handle().sparse_rt_ort_isa().decode()


def use_isa(name: str) -> None:
    """Choose the instruction set, "" for the best one; ``BackendError`` where the processor cannot run it."""
    # There is no separate product for BF16: the activations of ONNX models are float32.
    if _handle().sparse_rt_ort_use_isa(name.removesuffix("_bf16").encode()) != 0:
        raise BackendError(f"{ISA_VARIABLE}={name}: this processor cannot run it; allowed are {', '.join(ISAS)}")


def calls() -> int:
    """How often operators of the library ran in this process."""
    return _handle().sparse_rt_ort_calls()


@functools.cache
def _handle() -> ctypes.CDLL:
    handle = ctypes.CDLL(str(path()))
    handle.sparse_rt_ort_isa.restype = ctypes.c_char_p
    handle.sparse_rt_ort_calls.restype = ctypes.c_int64
    handle.sparse_rt_ort_use_isa.argtypes = [ctypes.c_char_p]
    return handle


@contextlib.contextmanager
def _sources() -> Iterator[tuple[Path, Path]]:
    with (
        as_file(files("sparse_rt.exporters.onnx").joinpath("csrc")) as own,
        as_file(files("sparse_rt.kernels.native").joinpath("csrc")) as shared,
    ):
        yield own, shared
