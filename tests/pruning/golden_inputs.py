import torch
from torch import Tensor


def inputs_of(seed: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """A weight [m, n] without zeros, and inputs [4, 40, n] with correlated columns, means and loud channels.

    Made of integers so small that float32 computes them without rounding, in whatever order.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(bound: int, *shape: int) -> Tensor:
        return torch.randint(-bound, bound, shape, generator=generator).float()

    weight = (2 * integers(2**15, m, n) + 1) / 2**14
    mix = torch.eye(n) + integers(2**3, n, n) / 2**6
    x = integers(2**6, 4, 40, n) @ mix / 2**5 + integers(2**3, n) / 2**4
    x[..., :: n // 8] *= 4
    return weight, x
