"""Adapters on compressed weights, as PEFT tuners: a differentiable map on the kept values, the mask untouched.

Importing this package needs PEFT. ``sparse_rt.SPPConfig`` and ``sparse_rt.MaskLoRAConfig`` import it on first use.
"""

from sparse_rt.optional import require

# Before any submodule: importing PEFT triggers our own registration (sparse_rt.hooks), which imports them all.
require("peft", extra="train")
