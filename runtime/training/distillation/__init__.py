"""Training against a dense teacher: the losses, where the teacher's outputs come from, and how they join a run."""

from sparse_rt.training.distillation.join import DenseTeacher, Recipe, described, distillation, recipe_of

__all__ = ["DenseTeacher", "Recipe", "described", "distillation", "recipe_of"]
