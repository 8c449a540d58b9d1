"""The adapters by name: what `finetune --adapter` knows, and what PEFT is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_rt.registry import Registry

if TYPE_CHECKING:
    from sparse_rt.adapters.base import SparseAdapterModel

_ADAPTERS: Registry[type[SparseAdapterModel]] = Registry(
    "adapter",
    (
        "sparse_rt.adapters.spp",
        "sparse_rt.adapters.masklora",
        "sparse_rt.adapters.values",
        "sparse_rt.adapters.dcft",
        "sparse_rt.adapters.seft",
    ),
)


def register_adapter(cls: type[SparseAdapterModel]) -> type[SparseAdapterModel]:
    """Class decorator for a tuner: known here under ``cls.name``, and to PEFT under its upper-case spelling."""
    from sparse_rt.adapters.peft_hooks import register_tuner

    register_tuner(cls)
    return _ADAPTERS.register(cls.name, cls)


def get_adapter(name: str) -> type[SparseAdapterModel]:
    """The tuner class called ``name``, whose ``config_cls`` holds the options; ``UserError`` with the known names."""
    return _ADAPTERS.get(name)


def adapter_names() -> list[str]:
    return _ADAPTERS.names()
