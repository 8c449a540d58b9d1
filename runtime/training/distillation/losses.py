"""The distillation losses, computed in float32 (or float64 when given that)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Of SquareHead's denominator: the mean square of a hidden state, which is far above it in any model.
EPSILON = 1e-6


# Logits that are wide at once: a divergence needs about six float32 tensors of them.
CHUNK_ELEMENTS = 1 << 24


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _OverChunks(torch.autograd.Function):
    """sum over chunks of rows of function(student[chunk], *others[chunk]), in wide precision.

    The gradient is formed on the way, in the dtype of ``student``: with a large vocabulary the intermediate tensors of
    all rows would take many times the logits' own memory. (Of float16 in float32: its small numbers would be lost
    before the scale of mixed-precision training reaches them.)
    """

    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], student: Tensor, *others: Tensor) -> Tensor:
        rows = max(1, CHUNK_ELEMENTS // max(1, student.shape[-1]))
        dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
        gradient = torch.empty_like(student, dtype=dtype) if ctx.needs_input_grad[1] else None
        total = _wide(student.new_zeros(()))
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            part = _wide(student[chunk].detach())
            with torch.set_grad_enabled(gradient is not None):
                part.requires_grad_(gradient is not None)
                loss = function(part, *(other[chunk] for other in others))
            if gradient is not None:
                gradient[chunk] = torch.autograd.grad(loss, part)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer: Tensor):
        (gradient,) = ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 2
        # ``outer`` is one number: it is used as wide as it is, and the product has the gradient's dtype.
        return None, (gradient * outer).to(ctx.dtype), *([None] * count)


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature^2 sum KL(softmax(teacher / temperature) || softmax(student / temperature)) over logits [N, V]."""

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        log_p = torch.log_softmax(_wide(teacher) / temperature, dim=-1)
        log_q = torch.log_softmax(student / temperature, dim=-1)
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()

    return _OverChunks.apply(divergence, student, teacher)


def top(teacher: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """What ``kl_of_top`` needs of logits [..., V]: the ``count`` likeliest tokens, and log-probabilities.

    ids int64 [..., count]; log-probabilities [..., count + 1] of those tokens and of all others together (the last
    column is left out when there are no others), at ``temperature``.
    """
    log_p = torch.log_softmax(_wide(teacher) / temperature, dim=-1)
    likeliest, ids = log_p.topk(min(count, log_p.shape[-1]), dim=-1)
    return ids, _with_rest(log_p, likeliest, ids)


def _with_rest(log_p: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
    if ids.shape[-1] == log_p.shape[-1]:
        return chosen
    rest = log_p.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return torch.cat([chosen, rest], dim=-1)


def kl_of_top(student: Tensor, ids: Tensor, log_p: Tensor, temperature: float) -> Tensor:
    """``kl`` between distributions over the teacher's likeliest tokens and one bucket of all others.

    student [N, V], ids [N, k], log_p [N, k + 1] of ``top``. It is at most the full divergence (what is merged can only
    come closer), with all tokens equal to it, and zero only when the student gives each of these tokens, and all others
    together, the probability that the teacher gives them. Without the bucket, renormalised over the k tokens, a student
    that leaves most of the probability to others would pay nothing for it.
    """

    def divergence(student: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
        log_q = torch.log_softmax(student / temperature, dim=-1)
        log_q = _with_rest(log_q, log_q.gather(-1, ids), ids)
        log_p = torch.log_softmax(log_p.to(log_q.dtype), dim=-1)  # stored in half precision it sums to 1 only roughly
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()

    return _OverChunks.apply(divergence, student, ids, log_p)


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor], tokens: Tensor, weights: Tensor) -> Tensor:
    """SquareHead (Kurtic et al., arXiv 2310.06927) of hidden states [B, T, H], one a block:

        sum over rows of weight * sum over blocks of mean((s - t)^2) / (mean(t^2) + eps)

    Means go over the ``tokens`` (bool [B, T]) of a row and the H numbers of each. The paper's code takes them over the
    whole batch; row by row, a batch is the sum of its rows, so accumulating gradients changes nothing. ``weights`` [B]
    add up to 1 over an optimizer step.
    """
    count = tokens.sum(1).clamp_min(1)

    def row_means(squares: Tensor) -> Tensor:
        return (squares.mean(-1) * tokens).sum(1) / count

    total = student[0].new_zeros((), dtype=_wide(student[0]).dtype)
    for s, t in zip(student, teacher, strict=True):
        s, t = _wide(s), _wide(t)
        total = total + (weights * row_means((s - t).square()) / (row_means(t.square()) + EPSILON)).sum()
    return total
