"""From a model folder of any supported kind to a sparse-rt folder: read, plan, prune, compress, write."""

from sparse_rt.conversion.plan import Plan, make_plan
from sparse_rt.conversion.source import Source, open_source
from sparse_rt.conversion.structure import Structure, read_structure
from sparse_rt.conversion.write import Writing, write_weights

__all__ = ["Plan", "Source", "Structure", "Writing", "make_plan", "open_source", "read_structure", "write_weights"]
