"""Registers the sparse_rt quantizer the moment transformers loads its quantizers, in either import order.

Importing ``transformers.quantizers`` costs seconds, so ``import sparse_rt`` must not do it: a finder on
``sys.meta_path`` waits for the import that the user's own code makes, and takes itself away afterwards.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

_TARGET = "transformers.quantizers"


def install() -> None:
    """Register now when transformers' quantizers are loaded already, otherwise right after they are."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    import sparse_rt.hf.quantizer  # noqa: F401  (its decorators register)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            original = spec.loader.exec_module

            def exec_module(module):
                original(module)
                _register()

            spec.loader.exec_module = exec_module
        return spec
