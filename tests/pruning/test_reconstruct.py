"""Reconstruction trains exactly the kept weights of one block, and nothing else."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import helpers
from sparse_rt.checkpoint import SourceCheckpoint
from sparse_rt.formats import get_format
from sparse_rt.pruning import BlockRunner, Compressed, Schedule, reconstruct

TOKENS = torch.randint(1, 4000, (6, 24), generator=torch.Generator().manual_seed(0))
SCHEDULE = Schedule(steps=12, learning_rate=0.03, seed=3)


def opened(folder, pattern):
    """A runner whose block 0 is pruned by magnitude, with what was kept: name -> (Compressed, mask)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    runner = BlockRunner(model, SourceCheckpoint.open(folder).load, follow_dense=True)
    runner.start(TOKENS)
    block, fmt, kept = runner.open(0), get_format(pattern), {}
    runner.advance_dense(0)
    for name, linear in block.named_modules():
        if not isinstance(linear, torch.nn.Linear):
            continue
        mask = fmt.mask_from_scores(linear.weight.float().abs(), 0.6)
        kept[name] = Compressed(pattern, *fmt.compress(linear.weight.detach(), mask)), mask
        runner.set_weight(0, name, torch.where(mask, linear.weight, 0))
    return runner, kept


def train_dense(runner, kept):
    """The same training with dense masked weights and plain torch: name -> trained weight."""
    block = copy.deepcopy(runner.blocks[0]).float().requires_grad_(False)
    weights = {name: block.get_submodule(name).weight.requires_grad_(True) for name in kept}
    rates = {name: 0.03 * weights[name].detach()[mask].square().mean().sqrt() for name, (_, mask) in kept.items()}
    optimizer = torch.optim.AdamW([{"params": [weights[name]], "lr": 0.0} for name in kept], weight_decay=0.0)
    scale = torch.stack([t.float().square().mean() for t in runner.dense]).mean()
    for step, batch in enumerate(SCHEDULE.order(0, len(TOKENS))):
        loss = 0
        for sequence in batch:
            args, kwargs = runner.call(0, sequence)
            rotation = tuple(t.float() for t in kwargs.get("position_embeddings") or ())
            kwargs = {**kwargs, "position_embeddings": rotation} if rotation else kwargs
            output = block(runner.hidden[sequence].float(), *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            loss = loss + (output - runner.dense[sequence].float()).square().mean() / (scale * len(batch))
        loss.backward()
        for group, (name, (_, mask)) in zip(optimizer.param_groups, kept.items(), strict=True):
            weights[name].grad *= mask
            group["lr"] = float(rates[name]) * SCHEDULE.factor(step)
        optimizer.step()
        optimizer.zero_grad()
    return weights


@pytest.mark.parametrize("family, pattern", [("llama", "2:4"), ("opt", "unstructured")])
def test_it_is_masked_training_of_one_block(tmp_path, family, pattern):
    runner, kept = opened(helpers.tiny_model(tmp_path / family, family), pattern)
    before = {name: tensor.clone() for name, tensor in runner.blocks[0].state_dict().items()}
    found = reconstruct(runner, 0, {name: weight for name, (weight, _) in kept.items()}, SCHEDULE)
    after = runner.blocks[0].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(type(runner.blocks[0].get_submodule(name)) is torch.nn.Linear for name in kept)
    fmt, error = get_format(pattern), runner.error(0)
    for name, expected in train_dense(runner, kept).items():
        weight, mask = kept[name]
        assert found[name].dtype == torch.float32 and found[name].shape == weight.values.shape
        dense = fmt.decompress(found[name], weight.metadata, *mask.shape)
        # AdamW turns tiny gradients into whole steps, so rounding shows in single values: a step is 0.03 of their size.
        assert (dense - expected.detach()).norm() < 0.01 * expected.detach().norm(), name
        assert not torch.equal(found[name], weight.values.float())
        runner.set_weight(0, name, dense)
    assert runner.error(0) < 0.9 * error


def test_the_schedule_rises_and_falls_and_uses_every_sequence():
    schedule = Schedule(steps=20, learning_rate=1.0, seed=1)
    factors = [schedule.factor(step) for step in range(20)]
    assert factors[0] == 0.5 and factors[1] == 1 and factors[-1] < 0.05
    assert factors[2:] == sorted(factors[2:], reverse=True)
    drawn = [sequence for batch in schedule.order(4, 10) for sequence in batch]
    assert all(sorted(drawn[start : start + 10]) == list(range(10)) for start in range(0, len(drawn) - 9, 10))
    assert schedule.order(4, 10) == Schedule(20, 1.0, 1).order(4, 10) != schedule.order(5, 10)
