"""What an exporter is: it turns a sparse-rt folder into an artefact of a serving engine, and can prove it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from sparse_rt.registry import Registry

EXPORTERS: Registry[type[Exporter]] = Registry(
    "exporter",
    (
        "sparse_rt.exporters.onnx.exporter",
        "sparse_rt.exporters.vllm.exporter",
        "sparse_rt.exporters.dense",
        "sparse_rt.exporters.compressed_tensors",
        "sparse_rt.exporters.int8",
    ),
)


class Exporter(ABC):
    """One target; ``name`` is what ``sparse-rt export --to`` takes. Importing the module must not import the engine."""

    name: str

    @abstractmethod
    def export(self, source: Path, output: Path, **options: Any) -> dict[str, Any]:
        """Write the artefact of sparse-rt folder ``source`` into the empty folder ``output``; returns facts to report.

        Raises ``UserError`` for a model or option that this target cannot take, before anything is written.
        """

    @abstractmethod
    def check(self, source: Path, output: Path) -> dict[str, Any]:
        """Load ``output`` in its engine and compare with ``source``; returns the figures, raises ``CheckFailed``."""


def register_exporter(cls: type[Exporter]) -> type[Exporter]:
    """Class decorator: make an exporter known under ``cls.name``."""
    return EXPORTERS.register(cls.name, cls)
