"""Make ``import sparse_rt`` work from a checkout in which the package is not installed; import this first.

Its folders are named by what they hold (pyproject.toml maps them to packages), so a path entry alone does not do.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def provide() -> None:
    if importlib.util.find_spec("sparse_rt") is not None:
        return
    folder = ROOT / "runtime"
    spec = importlib.util.spec_from_file_location(
        "sparse_rt", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["sparse_rt"] = module
    spec.loader.exec_module(module)


provide()
