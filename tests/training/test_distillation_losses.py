"""The distillation losses against their definitions in float64, values and gradients."""

import types

import pytest
import torch

from sparse_rt.training.distillation import DenseTeacher, Recipe, losses
from sparse_rt.training.distillation.teacher import Outputs
from sparse_rt.training.rows import real_tokens

B, T, V, H, BLOCKS = 4, 6, 11, 5, 3
LENGTHS = [6, 4, 5, 2]


def draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, params=[1 << 24, 2 * V], ids=["one chunk", "chunks of two"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", request.param)


@pytest.fixture
def batch():
    """(inputs, student outputs that need gradients, teacher outputs): rows of all lengths, some labels left out."""
    mask = torch.tensor([[1] * length + [0] * (T - length) for length in LENGTHS])
    labels = torch.where(mask.bool(), torch.arange(B * T).view(B, T) % V, -100)
    labels[0, :3] = -100  # a prompt
    student = types.SimpleNamespace(
        logits=draw(B, T, V, seed=1).requires_grad_(),
        hidden_states=[draw(B, T, H, seed=2 + i).requires_grad_() for i in range(BLOCKS + 1)],
    )
    teacher = Outputs(2 * draw(B, T, V, seed=7), None, [draw(B, T, H, seed=8 + i) for i in range(BLOCKS)])
    return {"input_ids": labels.clamp_min(0), "labels": labels, "attention_mask": mask}, student, teacher


def reference(inputs, student, teacher, recipe, items):
    """The definitions, one token and one number after the other."""
    labels, mask = inputs["labels"], inputs["attention_mask"]
    divergence = apart = 0
    for b in range(B):
        predicted = [t for t in range(T - 1) if labels[b, t + 1] != -100]  # the position before predicts a label
        for t in predicted:
            p = torch.softmax(teacher.logits[b, t] / recipe.temperature, 0)
            q = torch.softmax(student.logits[b, t] / recipe.temperature, 0)
            divergence = divergence + recipe.temperature**2 * (p * (p / q).log()).sum()
        for s, t in zip(student.hidden_states[1:], teacher.hidden, strict=True):
            s, t = s[b, : mask[b].sum()], t[b, : mask[b].sum()]
            apart = apart + len(predicted) * (s - t).square().mean() / (t.square().mean() + losses.EPSILON)
    return (recipe.kl * divergence + recipe.squarehead * apart) / items


@pytest.mark.parametrize("kl, squarehead, temperature", [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.7, 1.3, 2.5)])
def test_losses_and_gradients_are_those_of_the_definitions(batch, kl, squarehead, temperature):
    inputs, student, teacher = batch
    recipe = Recipe(0.5, kl, squarehead, temperature, None, None)
    loss = DenseTeacher(recipe, lambda _: teacher).combine(torch.tensor(3.0).double(), inputs, student, None)
    leaves = [student.logits, *student.hidden_states]
    items = (inputs["labels"][:, 1:] != -100).sum()
    expected = 1.5 + reference(inputs, student, teacher, recipe, items)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(value, leaves, materialize_grads=True) for value in (loss, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_micro_batches_add_up_to_one_batch(batch):
    inputs, student, teacher = batch
    distillation = DenseTeacher(Recipe(0.0, 1.0, 1.0, 2.0, None, None), None)
    items = (inputs["labels"][:, 1:] != -100).sum()

    def run(rows, num_items):
        distillation.teacher = lambda _: Outputs(teacher.logits[rows], None, [t[rows] for t in teacher.hidden])
        part = types.SimpleNamespace(
            logits=student.logits[rows], hidden_states=[h[rows] for h in student.hidden_states]
        )
        given = {name: tensor[rows] for name, tensor in inputs.items()}
        return distillation.combine(torch.zeros((), dtype=torch.float64), given, part, num_items)

    whole = run(slice(None), None)
    torch.testing.assert_close(run(slice(0, 3), items) + run(slice(3, 4), items), whole, rtol=1e-12, atol=0)


def test_padding_does_not_count(batch):
    inputs, student, teacher = batch
    distillation = DenseTeacher(Recipe(0.0, 1.0, 1.0, 1.0, None, None), lambda _: teacher)
    loss = distillation.combine(torch.zeros((), dtype=torch.float64), inputs, student, None)
    outside = ~real_tokens(inputs)
    for grad in torch.autograd.grad(loss, [student.logits, *student.hidden_states[1:]]):
        assert not grad[outside].any() and grad[~outside].any()


def test_a_bucket_for_the_rest():
    student, teacher = draw(9, V, seed=1).requires_grad_(), 2 * draw(9, V, seed=2)
    full = losses.kl(student, teacher, 1.5)
    before = 0.0
    for k in (1, 4, V - 2, V):
        ids, log_p = losses.top(teacher, k, 1.5)
        assert log_p.shape == (9, min(k + 1, V))
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(9, dtype=torch.float64))
        found = losses.kl_of_top(student, ids, log_p, 1.5)
        assert before < found <= full * (1 + 1e-12), "merging tokens brings distributions closer"
        before = found
    torch.testing.assert_close(found, full)
    for one, other in zip(*(torch.autograd.grad(loss, [student]) for loss in (found, full)), strict=True):
        torch.testing.assert_close(one, other)
    assert losses.kl_of_top(teacher, *losses.top(teacher, 4, 1.0), 1.0).abs() < 1e-12


def test_a_student_pays_for_what_it_gives_to_the_rest():
    """Renormalised over the likeliest tokens this student would look perfect."""
    teacher = draw(1, V, seed=3)
    ids, log_p = losses.top(teacher, 3, 1.0)
    student = teacher.clone()
    student[0, [i for i in range(V) if i not in ids[0].tolist()]] += 5
    renormalised = [torch.log_softmax(logits.gather(1, ids), 1) for logits in (student, teacher)]
    torch.testing.assert_close(*renormalised)
    assert losses.kl_of_top(student, ids, log_p, 1.0) > 1


def test_gradients_of_the_bucket():
    teacher = draw(5, V, seed=4)
    ids, log_p = losses.top(teacher, 3, 2.0)
    student = draw(5, V, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.kl_of_top(s, ids, log_p, 2.0), (student,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = draw(9, V, seed=1).to(dtype), draw(9, V, seed=2).to(dtype)
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    found, expected = losses.kl(leaf, teacher, 1.0), losses.kl(wide, teacher.double(), 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=0)
    # 1/3000 has no exact bfloat16: the scale of the loss must not be rounded.
    (found / 3000).backward()
    (expected / 3000).backward()
    ratio = (leaf.grad.double() * wide.grad).sum() / wide.grad.square().sum()
    assert leaf.grad.dtype == dtype and ratio == pytest.approx(1, rel=2e-3 if dtype == torch.bfloat16 else 1e-3)


def test_padding_of_packed_rows():
    positions = torch.tensor([[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
    assert real_tokens({"position_ids": positions}).tolist() == [[True] * 5 + [False] * 2, [True] * 7]
