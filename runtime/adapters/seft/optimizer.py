"""AdamW on deltas whose positions move: every element has an age of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SparseAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; state float32, bias correction by the age of each element.

    Weight decay pulls a delta to 0, which is its base value. Where all elements are equally old this is AdamW.
    ``age`` is a float32 tensor (exact to 16 million steps): ``load_state_dict`` of torch casts state to the dtype of
    its parameter. ``extra`` is what else belongs to a checkpoint: (state(), load(state)).
    """

    def __init__(self, params: Iterable[Any], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, extra=None):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.extra = extra

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state_of(parameter), parameter.grad.float()
        (beta1, beta2), age = group["betas"], state["age"].add_(1)
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        scale = (square / since(beta2, age)).sqrt_().add_(group["eps"])
        parameter.sub_((mean / since(beta1, age)).div_(scale).mul_(group["lr"]).to(parameter.dtype))

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """exp_avg, exp_avg_sq and age of a parameter, zero before its first step."""
        state = self.state[parameter]
        if not state:
            for name in ("exp_avg", "exp_avg_sq", "age"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
        return state

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        return saved if self.extra is None else {**saved, "extra": self.extra[0]()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        extra = state_dict.get("extra")
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        if self.extra is not None and extra is not None:
            self.extra[1](extra)


def since(beta: float, age: Tensor | float) -> Tensor | float:
    """1 - beta^age, without the cancellation that makes 1 - 0.999 inexact in float32."""
    if isinstance(age, Tensor):
        return -torch.expm1(age * math.log(beta)) if beta > 0 else torch.ones_like(age)
    return -math.expm1(age * math.log(beta)) if beta > 0 else 1.0
