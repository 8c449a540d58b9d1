"""The models that the engine onnx puts side by side: ours, the dense one, and what ONNX Runtime makes of the dense one.

Another model is another line of ``TABLE``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_rt.exporters.onnx.exporter import OnnxExporter
from sparse_rt.progress import Progress


@dataclass(frozen=True)
class Side:
    """A model called ``name`` in the rows.

    ``export`` are the options of our exporter; with ``bits`` it is the dense model, its weights quantized by ONNX
    Runtime. ``ours`` is compared with every side that is not; ``lossy`` sides are left out without ``--quantized``.
    """

    name: str
    export: dict[str, Any] = field(default_factory=dict)
    bits: int | None = None
    ours: bool = False
    lossy: bool = False


TABLE = (
    Side("dense", export={"form": "dense"}),
    Side("sparse", ours=True),
    Side("int8 MatMulNBits", bits=8, lossy=True),
    Side("int4 MatMulNBits", bits=4, lossy=True),
    Side("sparse int8", export={"values": "int8"}, ours=True, lossy=True),
)


def chosen_sides(quantized: bool) -> list[Side]:
    """The sides of a run, in the order in which they take turns."""
    return [side for side in TABLE if quantized or not side.lossy]


def compared(sides: list[Side]) -> list[tuple[str, str]]:
    """(other model, model of ours) for every row of a figure; dense and sparse come first."""
    return [(other.name, ours.name) for ours in sides if ours.ours for other in sides if not other.ours]


def write_sides(
    sides: list[Side], source: Path, folder: Path, progress: Progress
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Every side of the sparse-rt folder ``source`` in a folder of its own in ``folder``, and the facts about it."""
    folders, facts = {}, {}
    for index, side in enumerate(sides):
        progress.stage(f"exporting the {side.name} ONNX model")
        target = folders[side.name] = folder / str(index)
        target.mkdir()
        if side.bits is None:
            facts[side.name] = OnnxExporter().export(source, target, **side.export)
        else:
            from sparse_rt.benchmarking.onnx_quantized import quantize

            facts[side.name] = quantize(folders["dense"], target, side.bits)
    return folders, facts
