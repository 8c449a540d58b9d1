"""What the parts of gpu_suite.py share: shapes, random sparse weights, errors against float64, and a task's frame."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timing import ratio, spread
from torch import Tensor

from sparse_rt.formats import get_format

Row = dict[str, Any]

SHAPES = {
    "Llama-3-8B": {"q/o": (4096, 4096), "k/v": (1024, 4096), "gate/up": (14336, 4096), "down": (4096, 14336)},
    "Llama-3.2-1B": {"q/o": (2048, 2048), "k/v": (512, 2048), "gate/up": (8192, 2048), "down": (2048, 8192)},
    "Llama-3-70B": {"q/o": (8192, 8192), "k/v": (1024, 8192), "gate/up": (28672, 8192), "down": (8192, 28672)},
}
DRY_SHAPES = {"Llama-3-8B": {"q/o": (48, 64)}, "Llama-3.2-1B": {"down": (32, 160)}}

ROTATED_BYTES = 256 << 20  # four times the second-level cache of an H200
MAX_COPIES = 128
# Triton's interpreter cuts a float32 off to bfloat16 instead of rounding it, which doubles the error.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Relative RMS error of a product with float32 sums: at most this many times that of cuBLAS (of torch in the dry run)
# on the same x; it is the rounding of the result, so a floor keeps a lucky dense product from failing a correct kernel.
ERROR_RATIO = 1.5
ERROR_FLOOR = {torch.bfloat16: 5e-3 if INTERPRETED else 2.5e-3, torch.float16: 3e-4, torch.float32: 2e-6}


class Wrong(Exception):
    """A result that differs from float64 by more than rounding: an error row, and no time is reported."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way to prune a weight."""

    pattern: str
    sparsity: float

    def __str__(self) -> str:
        return self.pattern if ":" in self.pattern else f"{self.sparsity:.0%}"

    @property
    def fields(self) -> Row:
        return {"pattern": self.pattern, "sparsity": self.sparsity}


CELLS = (Cell("2:4", 0.5), *(Cell("unstructured", sparsity) for sparsity in (0.5, 0.6, 0.7, 0.75, 0.9)))


@dataclasses.dataclass
class Context:
    """Where a task runs and until when (``time.monotonic``); ``emit`` writes a row at once."""

    device: torch.device
    dry: bool
    deadline: float
    emit: Callable[[Row], None]

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, int]]]:
        return DRY_SHAPES if self.dry else SHAPES

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (CELLS[0], CELLS[4]) if self.dry else CELLS

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def attempt(self, fields: Row, part: Callable[[], Row | Iterable[Row] | None]) -> bool:
        """Rows of ``part`` with ``fields``; an error row where it fails. A broken GPU context is not survived here."""
        try:
            found = part()
            for row in [found] if isinstance(found, dict) else found or []:
                self.emit({**fields, **row})
        except Exception as error:
            self.emit({**fields, "error": short(error)})
            if gpu_is_broken(self.device):
                raise
            return False
        return True


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    run: Callable[[Context], None]


def short(error: BaseException) -> str:
    """The error in one line, with the innermost place in this repository."""
    where, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "site-packages" not in code.co_filename and "/lib/python" not in code.co_filename:
            where = f" ({code.co_filename.rpartition('/')[2]}:{trace.tb_lineno})"
        trace = trace.tb_next
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:600]}{where}"


def gpu_is_broken(device: torch.device) -> bool:
    """After an illegal access every further call of the process fails: only a new process helps."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(8, device=device).sum().item()
    except Exception:
        return True
    return False


def generator(device: torch.device, *seeds: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(hash(seeds) & 0x7FFFFFFF)


def random_weight(m: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal weights without an exact zero, which a format could take for a pruned one."""
    weight = (torch.randn(m, n, device=device, generator=generator(device, m, n)) * 0.02).to(dtype)
    return weight.masked_fill_(weight == 0, 0.02)


def random_mask(cell: Cell, m: int, n: int, device: torch.device) -> Tensor:
    """bool [m, n]; what a layer costs depends on how many are kept, not on which."""
    source = generator(device, m, n, int(cell.sparsity * 1000))
    if cell.pattern == "unstructured":
        return torch.rand(m, n, device=device, generator=source) >= cell.sparsity
    if cell.pattern == "2:4":
        pairs = [[i in pair for i in range(4)] for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
        choice = torch.randint(6, (m, n // 4), device=device, generator=source)
        return torch.tensor(pairs, device=device)[choice].view(m, n)
    return get_format(cell.pattern).mask_from_scores(torch.rand(m, n, device=device, generator=source))


def product64(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in float64, a block of rows at a time: x [..., n], W [m, n] -> [..., m]."""
    rows = max(1, (64 << 20) // max(1, weight.shape[1]))
    x = x.double()
    blocks = [x @ weight[start : start + rows].double().t() for start in range(0, weight.shape[0], rows)]
    result = torch.cat(blocks, dim=-1) if blocks else x.new_zeros((*x.shape[:-1], 0))
    return result if bias is None else result + bias.double()


def rms(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|; where zeros are expected, |actual|."""
    if actual.shape != expected.shape:
        raise Wrong(f"the result has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    norm = expected.double().norm()
    error = (actual.detach().double() - expected.double()).norm()
    return float(error / (norm if norm > 0 else 1))


def check_error(found: float, dense: float, dtype: torch.dtype) -> None:
    """``Wrong`` where ``found`` is worse than rounding; NaN is."""
    allowed = max(ERROR_RATIO * dense, ERROR_FLOOR[dtype])
    if not found <= allowed:
        raise Wrong(f"relative RMS error {found:.2e} to float64, allowed {allowed:.2e}")


def poison(device: torch.device, *nbytes: int) -> None:
    """Fill the memory that the next allocations of these sizes get with NaN: an element not written shows."""
    for size in nbytes:
        held = [torch.full((max(1, size // 4),), float("nan"), device=device) for _ in range(2)]
        del held


def copies_for(nbytes: int, dry: bool) -> int:
    """Copies of a weight that no cache holds together."""
    return 2 if dry else min(MAX_COPIES, max(2, math.ceil(ROTATED_BYTES / max(1, nbytes))))


def figures(times: dict[Any, list[float]], dense: Any, sparse: Any) -> Row:
    """The part of a row that both times give: microseconds and dense / sparse within a turn."""
    return {
        "us": {"dense": spread(times[dense], 1e6), "sparse": spread(times[sparse], 1e6)},
        "ratio": ratio(times[dense], times[sparse]),
        "turns": len(times[sparse]),
    }
