"""Load the compiled kernels once a process, or remember in a sentence why they cannot be used.

``SPARSE_RT_NATIVE_ISA=scalar|avx2|avx512|avx512_bf16`` forces the instruction set (for tests and comparisons).
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

# Before the kernels: torch brings the OpenMP runtime that they are linked against.
import torch

from sparse_rt.errors import BackendError
from sparse_rt.kernels.native import torch_op
from sparse_rt.kernels.native.build import BuildError, build

logger = logging.getLogger(__name__)

ISA_VARIABLE = "SPARSE_RT_NATIVE_ISA"
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
# Moving elements needs no arithmetic, so the two kinds of AVX-512 share their row kernels.
_ROW_ISAS = {"avx512_bf16": "avx512"}

_TYPES = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "s": ctypes.c_char_p,
    "v": None,
}
# Result and arguments of every C function, in the order of its declaration in csrc/.
SIGNATURES = {
    "srt_expand_bitmask": "l = plpp llii",
    "srt_gather_bitmask": "l = pppl llii",
    "srt_expand_24": "l = ppp llii",
    "srt_gather_24": "l = ppp llii",
    "srt_grad_bytes": "l = lllil",
    "srt_values_grad": "l = pplpi plll iiii pli",
    "srt_factors_grad": "l = pplpi plll ii ppfl pp ii pli",
    "srt_factors_apply": "l = pilpill ppfl f pi pi",
    "srt_packed_runs": "i = ii",
    "srt_packed_plan": "l = iipi lll ppp i",
    "srt_packed_bytes": "l = p",
    "srt_packed_make": "v = ppi pppp i",
    "srt_packed_kind": "i = plll",
    "srt_packed_unmake": "i = plll ppp i",
    "srt_packed_workspace": "l = pl",
    "srt_packed_linear": "i = plll pll ppl pi",
    "srt_packed_experts": "i = pllli ppil plp plp lliippi",
    "srt_torch_register": "i = p",
    "srt_torch_unregister": "v = ",
    "srt_advise_huge": "v = pl",
    "srt_page_out": "v = pl",
    "srt_packed_isa": "s = ",
    "srt_isa": "s = ",
    "srt_packed_use_isa": "i = s",
    "srt_use_isa": "i = s",
}

_lock = threading.Lock()
_loaded: Library | str | None = None


@dataclass(frozen=True)
class Library:
    """The C functions: they take raw addresses, release the GIL and return a number of values (-1: bad arguments)."""

    path: Path
    handle: ctypes.CDLL

    @property
    def isa(self) -> str:
        return self.handle.srt_packed_isa().decode()

    @property
    def has_threads(self) -> bool:
        return bool(self.handle.srt_has_threads())

    def use_isa(self, name: str) -> None:
        """Choose the kernels: one of ``ISAS``, or "" for the best one; ``BackendError`` if the processor cannot."""
        rows = _ROW_ISAS.get(name, name)
        if self.handle.srt_packed_use_isa(name.encode()) != 0 or self.handle.srt_use_isa(rows.encode()) != 0:
            known = name in ISAS
            raise BackendError(
                f"{ISA_VARIABLE}={name}: "
                + ("this processor cannot run it" if known else f"unknown; allowed are {', '.join(ISAS)}")
            )


def load() -> Library:
    """The kernels, compiled and loaded at the first call; ``BackendError`` with the reason when there are none."""
    reason = unavailable_reason()
    if reason is not None:
        raise BackendError(f"native kernels: {reason}")
    return _loaded  # type: ignore[return-value]


def unavailable_reason() -> str | None:
    """None when the kernels can be used, otherwise why not and what to do. The first call compiles and loads them."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _open()
    return _loaded if isinstance(_loaded, str) else None


def forget() -> None:
    """Let the next call compile and load again (after the cause of a failure was removed)."""
    global _loaded
    with _lock:
        _loaded = None


def _renew_lock() -> None:
    # A lock that another thread held at fork() stays locked in the child for ever.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _open() -> Library | str:
    try:
        library = _load_file(build())
    except _LoadError:
        # A cached file that this system cannot load (cut off, or built against a newer C library): make it again.
        try:
            library = _load_file(build(rebuild=True))
        except (BuildError, _LoadError) as error:
            return _warn(str(error))
    except BuildError as error:
        return _warn(str(error))
    try:
        library.use_isa(os.environ.get(ISA_VARIABLE, ""))
        torch_op.register(library.handle)
    except BackendError as error:
        return _warn(str(error))
    logger.info("native kernels: %s, %s, torch %s", library.path, library.isa, torch.__version__)
    return library


def _warn(reason: str) -> str:
    logger.warning("Native CPU kernels are off, the slower reference backend runs instead: %s", reason)
    return reason


class _LoadError(Exception):
    pass


def _load_file(path: Path) -> Library:
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise _LoadError(f"{path} cannot be loaded ({error}); delete it to have it compiled again") from error
    for name, signature in SIGNATURES.items():
        result, arguments = signature.split(" = ")
        function = getattr(handle, name)
        function.restype = _TYPES[result]
        function.argtypes = [_TYPES[letter] for letter in arguments.replace(" ", "")]
    return Library(path, handle)
