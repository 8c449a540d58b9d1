"""sparse-rt: sparse LLM weights that stay compressed from disk to serving.

Importing this package registers the ``sparse_rt`` format with transformers and the adapters with PEFT (as soon as they
are imported, before or after) and costs milliseconds: heavy packages are imported only by what needs them.
"""

from pathlib import Path

# A source checkout keeps kernels/, exporters/ and tools/ beside this folder; a wheel nests them in it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))

from sparse_rt.errors import BackendError, CheckFailed, FormatError, SparseRTError, UserError
from sparse_rt.hooks import install as _install_hooks
from sparse_rt.version import __version__

_install_hooks()

# Public name -> module that defines it; resolved on first use so that `import sparse_rt` stays cheap.
_LAZY = {
    "SparseLinear": "sparse_rt.nn",
    "SparseConfig": "sparse_rt.checkpoint.config",
    "Checkpoint": "sparse_rt.checkpoint",
    "get_format": "sparse_rt.formats",
    "load": "sparse_rt.hf.load",
    "SPPConfig": "sparse_rt.adapters.spp",
    "MaskLoRAConfig": "sparse_rt.adapters.masklora",
    "ValuesConfig": "sparse_rt.adapters.values",
    "DCFTConfig": "sparse_rt.adapters.dcft",
    "SEFTConfig": "sparse_rt.adapters.seft",
}

__all__ = [
    "BackendError",
    "CheckFailed",
    "FormatError",
    "SparseRTError",
    "UserError",
    "__version__",
    *_LAZY,
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'sparse_rt' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
