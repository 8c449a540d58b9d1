"""SEFT (sparsity evolution fine-tuning, arXiv 2505.24037, on SpIEL, arXiv 2401.16405): sparse deltas that move.

    W_eff = W + scatter(positions, delta),   K positions a weight, float32 deltas

Every ``interval`` optimizer steps positions that learned little are dropped and positions with a large gradient are
grown; where the pattern allows it the mask itself evolves, and is pruned back to the exact number of kept weights.

The authors' code is not public. What follows the paper and SpIEL's code: the deltas, the drop by |delta|, the growth by
|accumulated signed gradient| of candidates from one micro-batch, the cosine drop rate, the seeded optimizer state,
pruning back by sensitivity, N:M weights that keep their mask. What is our reading:

- The cycle is rotated: Adapt, Drop, Grow, train an interval; Adapt once more at the end. Pruning right after growing
  would remove what was grown: a grown weight is 0, and so is its sensitivity |theta g|.
- The gradient in the sensitivity is summed over the window of the last ``window`` steps before an evolution, for K
  candidates that are the least sensitive in the first micro-batch of the window: the rule by which SpIEL finds
  candidates of growth, and as much memory.
- At least as many pruned positions are grown as grown positions are dropped, so that the count of kept weights never
  falls below the target between two Adapts.
- ``nm_swap`` is not in the paper: see ``rules.swap``.
"""

from sparse_rt.adapters.seft.config import SEFTConfig
from sparse_rt.adapters.seft.layer import SEFTLayer
from sparse_rt.adapters.seft.model import SEFTModel

__all__ = ["SEFTConfig", "SEFTLayer", "SEFTModel"]
