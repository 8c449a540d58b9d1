"""ONNX export: one file whose weights stay compressed and that every ONNX Runtime can run.

exporter.py                   the options, and the steps of an export
skeleton.py                   a model without its weights: modules, buffers, placeholders
trace.py, builder.py          its graph: standard operators, or those of onnxruntime-genai's model builder
encoder.py, experts.py        the same for models without a cache; a branch for every expert of a mixture
assemble.py, external.py      weights attached to a graph, one at a time; the data file they go to
operands.py, rows.py          as which operator, with which tensors; those that one operator reads together
functions.py, body.py         the operators as functions of standard operators, the fallback inside the file
graph.py                      reading graphs that have graphs in them
library.py, csrc/             the operators as a library for ONNX Runtime
engine.py, generation.py      sessions with that library, a small generate loop
check.py, stored.py           the proof of an export; what its file holds
manifest.py, readme.py        sparse_rt.json and README.md of the exported folder
genai.py                      what onnxruntime-genai wants beside it
"""

from sparse_rt.exporters.onnx.engine import session, which_kernel

__all__ = ["session", "which_kernel"]
