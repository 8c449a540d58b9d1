"""Optional packages: imported where they are used, through one helper whose error names the extra to install."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from sparse_rt.errors import UserError


def require(module: str, extra: str) -> ModuleType:
    """Import ``module`` or raise ``UserError`` naming the extra of sparse-rt that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"This needs the package {module!r}, which could not be imported ({error}); "
            f'install it with: pip install "sparse-rt[{extra}]"'
        ) from error


def available(module: str) -> bool:
    """True when ``module`` is installed (it is not imported)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
