"""Joins other packages the moment they are imported, in either import order.

Importing transformers' quantizers or PEFT costs seconds, so ``import sparse_rt`` must not do it: a finder on
``sys.meta_path`` waits for the import that the user's own code makes and runs our registration right after it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

from sparse_rt.errors import UserError

# Package or module to wait for -> the module of ours whose import registers with it.
_JOINS = {
    "transformers.quantizers": "sparse_rt.hf.quantizer",
    "peft": "sparse_rt.adapters.peft_join",
}


def install() -> None:
    """Register with what is loaded already; wait for the rest."""
    waiting = {name for name in _JOINS if name not in sys.modules}
    for name in _JOINS.keys() - waiting:
        _join(name)
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))


def _join(name: str) -> None:
    try:
        importlib.import_module(_JOINS[name])
    except UserError as error:  # an unsupported version must not make the user's own import fail
        warnings.warn(str(error), stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, waiting: set[str]):
        self.waiting = waiting

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting:
            return None
        self.waiting.discard(name)
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            original = spec.loader.exec_module

            def exec_module(module):
                original(module)
                _join(name)

            spec.loader.exec_module = exec_module
        return spec
