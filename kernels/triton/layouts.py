"""Which derived layout a served weight gets on a GPU: one that some kernel reads faster than the dense way, or none.

A weight without such a layout stays as it is stored, values and metadata: that is the smallest form, and the one that
is expanded most quickly.

    d4            every weight; products take as many steps as there are kept weights
    mma_sp        2:4 in bfloat16 or float16; the sparse tensor cores read it as it is
    cslt          the same, in the order of cuSPARSELt, with the metadata: 1.25 bytes a weight
    mma_sp+cslt   both, for few and many tokens: 2.25 bytes a weight, more than the 2 of the dense one
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_rt.formats import get_format
from sparse_rt.kernels.triton import configs, cslt, dispatch, fragments

logger = logging.getLogger(__name__)

LAYOUTS = ("d4", "mma_sp", "cslt", "mma_sp+cslt")
TRUSTED_ERROR = 1e-2  # relative RMS; rounding the result to bfloat16 makes 2e-3


def choose_layout(
    pattern: str, dtype: torch.dtype, sparsity: float, shape: tuple[int, int] | None = None
) -> tuple[str | None, str]:
    """The layout for a served weight (m, n) on the current GPU, None where it has no use, and the reason in words.

    Without ``shape``: for a large weight.
    """
    return _choose(dispatch.state(), configs.gpu_name(), pattern, dtype, sparsity, *(shape or (1 << 16, 1 << 16)))


# Layers that stay as they are stored ask at every call.
@functools.lru_cache(maxsize=4096)
def _choose(_state, _gpu, pattern: str, dtype: torch.dtype, sparsity: float, m: int, n: int) -> tuple[str | None, str]:
    d4 = dispatch.limits("d4", dispatch.BITMASK, m, n, sparsity, dtype)
    if pattern != "2:4":
        return ("d4", f"its kernel for {d4}") if not d4.never else (None, dispatch.refusal("d4"))
    reason = _no_fragments(dtype)
    decode, library = (dispatch.limits(kernel, pattern, m, n, sparsity, dtype) for kernel in ("mma_sp", "cslt"))
    missing = None if library.never else cslt.refusal(dtype, m, n)
    library = library if missing is None else dispatch.NEVER
    if reason is None and library.replaces:
        return "cslt", "cuSPARSELt is the fastest for any number of tokens"
    if reason is None and not (decode.never and library.never) and torch.cuda.is_available():
        reason = _distrust(dtype)
    if reason is None and not library.never:
        few = "" if decode.never else f"sparse tensor cores for {decode}, "
        return "mma_sp+cslt", f"{few}cuSPARSELt for {library}; two forms of the weight"
    if reason is None and not decode.never:
        return "mma_sp", f"sparse tensor cores for {decode}" + (f"; {missing}" if missing else "")
    if not d4.never:
        return "d4", f"its kernel for {d4}; {reason or dispatch.refusal('mma_sp')}"
    return None, reason or missing or dispatch.refusal("mma_sp")


def possible_layout(pattern: str, dtype: torch.dtype, sparsity: float, shape: tuple[int, int]) -> str:
    """The layout of a weight that is to be packed whether or not a kernel has been measured."""
    chosen = choose_layout(pattern, dtype, sparsity, shape)[0]
    return chosen or ("mma_sp" if pattern == "2:4" and _no_fragments(dtype) is None else "d4")


@functools.cache
def _no_fragments(dtype: torch.dtype) -> str | None:
    """Why 2:4 weights of ``dtype`` do not go to the sparse tensor cores, or None."""
    if dtype not in fragments.DTYPES:
        return f"the sparse tensor cores multiply bfloat16 and float16, not {_short(dtype)}"
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this Triton has no Gluon, with which the sparse tensor cores are reached"
    if torch.version.hip is not None:
        return "the sparse tensor cores are reached with PTX, this GPU is not one of NVIDIA's"
    return None


@functools.cache
def _distrust(dtype: torch.dtype) -> str | None:
    from sparse_rt.kernels.triton import mma_sp

    with torch.inference_mode(False), torch.no_grad():
        reason = disagreement(dtype, torch.device("cuda"), mma_sp.linear)
    if reason is not None:
        logger.warning("2:4 weights take the layout d4: %s", reason)
    return reason


def disagreement(dtype: torch.dtype, device: torch.device, linear: Callable[..., Tensor]) -> str | None:
    """Why products with fragments are not trusted on ``device``, or None: a small weight against its dense form.

    Until a GPU has run them, the order of their registers rests on the text of the instruction set and an emulator
    (tests/kernels/triton/ptx.py). A wrong one must not reach a model unseen. Once a process and dtype.
    """
    fmt, (m, n), generator = get_format("2:4"), (40, 548), torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator).to(dtype)
    values, metadata = fmt.compress(weight, fmt.mask_from_scores(weight.abs()))
    dense = fmt.decompress(values, metadata, m, n).double()
    parts = fragments.pack_fragments(values.to(device), metadata.to(device), m, n)
    for tokens in (1, 16):
        x = torch.randn(tokens, n, generator=generator).to(dtype)
        expected = x.double() @ dense.T
        try:
            found = linear(x.to(device), *parts, None, m, n).cpu().double()
        except Exception as error:  # whatever the compiler or the driver has to say
            return f"the kernel of the sparse tensor cores does not run on this GPU ({type(error).__name__}: {error})"
        error = float((found - expected).norm() / expected.norm())
        if not error < TRUSTED_ERROR:
            return f"on this GPU the sparse tensor cores' product has a relative error of {error:.1e}; please report it"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
