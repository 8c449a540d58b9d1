"""ONNX export: one file whose weights stay compressed and that every ONNX Runtime can run.

exporter.py, trace.py, assemble.py   the graph of a model, its weights attached compressed
functions.py                         the operators as functions of standard operators, the fallback inside the file
library.py, csrc/                    the operators as a library for ONNX Runtime
engine.py, generation.py             sessions with that library, a small generate loop
check.py, readme.py                  the proof of an export, its README
"""

from sparse_rt.exporters.onnx.engine import session, which_kernel

__all__ = ["session", "which_kernel"]
