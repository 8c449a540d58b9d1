"""Channel permutation: found without names, the function unchanged, N:M hurting less."""

import itertools

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import helpers
from sparse_rt.checkpoint import SourceCheckpoint
from sparse_rt.formats import get_format
from sparse_rt.pruning import BlockRunner
from sparse_rt.pruning.permutation import Channels, find_channels

# Family, what differs from its small model, and for each permutable linear: inputs that move as one, and the linears
# whose rows move along. Phi-3 with fewer key-value heads keeps them out of step with the inputs of o_proj.
FAMILIES = {
    "llama": ({}, {"self_attn.o_proj": (2, ["v_proj"]), "mlp.down_proj": (1, ["gate_proj", "up_proj"])}),
    "odd heads": (
        dict(hidden_size=72, num_attention_heads=6, head_dim=12, intermediate_size=100),
        {"self_attn.o_proj": (3, ["v_proj"]), "mlp.down_proj": (1, ["gate_proj", "up_proj"])},
    ),
    "phi3": (
        dict(num_key_value_heads=4),
        {"self_attn.o_proj": (1, ["qkv_proj"]), "mlp.down_proj": (1, ["gate_up_proj", "gate_up_proj"])},
    ),
    "phi3 grouped": ({}, {"mlp.down_proj": (1, ["gate_up_proj", "gate_up_proj"])}),
    "opt": ({}, {"self_attn.out_proj": (1, ["v_proj"]), "fc2": (1, ["fc1"])}),
    "gemma2": ({}, {"self_attn.o_proj": (2, ["v_proj"]), "mlp.down_proj": (1, ["gate_proj", "up_proj"])}),
    "qwen3": ({}, {"self_attn.o_proj": (2, ["v_proj"]), "mlp.down_proj": (1, ["gate_proj", "up_proj"])}),
}


def opened(folder, dtype=torch.bfloat16):
    """A runner with block 0 open, which is called with 16 tokens."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    runner = BlockRunner(model, SourceCheckpoint.open(folder).load)
    runner.start(torch.randint(1, 4000, (1, 16), generator=torch.Generator().manual_seed(0)))
    runner.open(0)
    return runner


def permute(block, moves):
    for name, (rows, columns) in moves.items():
        linear = block.get_submodule(name)
        if rows is not None:
            linear.weight.data = linear.weight.data[rows]
            if linear.bias is not None:
                linear.bias.data = linear.bias.data[rows]
        if columns is not None:
            linear.weight.data = linear.weight.data[:, columns]


@pytest.mark.parametrize("case", FAMILIES)
def test_what_moves_is_found_and_leaves_the_function_alone(case, tmp_path):
    family = "llama" if case == "odd heads" else case.split()[0]
    changes, expected = FAMILIES[case]
    runner = opened(helpers.tiny_model(tmp_path / "model", family, **changes))
    block, (args, kwargs) = runner.blocks[0], runner.call(0, 0)
    found = find_channels(block, runner.hidden[0], args, kwargs)
    short = {c.consumer: (c.columns.shape[1], [name.rpartition(".")[2] for name, _ in c.rows]) for c in found}
    assert short == expected

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokens = torch.randint(1, 4000, (2, 24))
    with torch.no_grad():
        before = model(tokens).logits
        twin = model.get_submodule(runner.block_name(0))
        weights = {name: p.clone() for name, p in twin.named_parameters()}
        for channels in found:
            importance = torch.rand(twin.get_submodule(channels.consumer).in_features)
            permute(twin, channels.moves(channels.order(importance, 4), twin))
        after = model(tokens).logits
    assert torch.allclose(before, after, atol=1e-4 * float(before.std()))
    moved = {name for name, p in twin.named_parameters() if not torch.equal(p, weights[name])}
    for consumer, (_, producers) in expected.items():
        parent = consumer.rpartition(".")[0]
        names = [consumer, *(f"{parent}.{name}".lstrip(".") for name in producers)]
        assert {f"{name}.weight" for name in names} <= moved


def test_weights_do_not_matter_and_are_not_read(tmp_path):
    folder = helpers.tiny_llama(tmp_path / "model")
    runner = opened(folder)
    usual = find_channels(runner.blocks[0], runner.hidden[0], *runner.call(0, 0))
    for linear in runner.blocks[0].modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data = linear.weight.data.new_full((), float("nan")).expand(linear.weight.shape)
    blind = find_channels(runner.blocks[0], runner.hidden[0], *runner.call(0, 0))
    for a, b in zip(usual, blind, strict=True):
        assert a.consumer == b.consumer and torch.equal(a.columns, b.columns) and torch.equal(a.kinds, b.kinds)
    assert all("forward" not in vars(module) for module in runner.blocks[0].modules())


class Odd(nn.Module):
    """Blocks where rows and inputs are linked, but not so that they could move."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(8, 16), nn.Linear(16, 8)
        self.c, self.d = nn.Linear(16, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        y = torch.relu(self.a(x))
        if self.kind == "normed":  # every input depends on every row
            return x + self.b(self.norm(y))
        if self.kind == "shared":  # the rows feed two linears
            return x + self.b(y) + self.c(y)
        if self.kind == "output":  # and the output of the block
            return x + self.b(y) + y[..., :8]
        if self.kind == "twice":  # one linear in two places
            return x + self.d(self.d(x))
        if self.kind == "mixed":  # neighbours meet
            return x + self.b(y + y.roll(1, -1))
        if self.kind == "crossed":  # bundles {0, 1}, {2, 3}... by one producer, {1, 2}, {3, 4}... by the other
            z, w = self.d(x).repeat_interleave(2, -1), self.d2(x).repeat_interleave(2, -1).roll(1, -1)
            return x + self.b(z * w)
        return x + self.b(y)


@pytest.mark.parametrize("kind", ["normed", "shared", "output", "twice", "mixed", "crossed", "plain"])
def test_nothing_moves_that_something_else_hears(kind):
    block = Odd(kind)
    block.d2 = nn.Linear(8, 8)
    found = find_channels(block, torch.randn(1, 16, 8), (), {})
    assert [channels.consumer for channels in found] == (["b"] if kind == "plain" else [])


def test_channels_are_dealt_there_and_back():
    channels = Channels("down", torch.arange(8).view(8, 1), (("up", torch.arange(8)),), torch.zeros(8).long())
    importance = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])
    order = channels.order(importance, 4)
    assert importance[order].tolist() == [8, 5, 4, 1, 7, 6, 3, 2]
    # Kinds stay apart, and a group that they share stays as it is.
    kinds = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    mixed = Channels("down", channels.columns, channels.rows, kinds)
    assert mixed.order(importance.flip(0), 2).tolist() == [3, 0, 2, 1, 4, 5, 7, 6]


def test_dealing_keeps_more_than_leaving_and_groups_of_heads_move_as_one():
    """Two query heads of 8 inputs share a key-value head: the groups of both get the same channels."""
    columns = torch.stack([torch.arange(8), torch.arange(8) + 8], dim=1)
    channels = Channels("o", columns, (("v", torch.arange(8)),), torch.zeros(8).long())
    importance = torch.tensor([9.0, 9, 8, 8, 1, 1, 2, 2] * 2)
    order = channels.order(importance, 4)
    block = nn.ModuleDict({"o": nn.Linear(16, 4), "v": nn.Linear(4, 8)})
    moves = channels.moves(order, block)
    assert torch.equal(moves["v"][0], order) and torch.equal(moves["o"][1], torch.cat([order, order + 8]))
    kept = get_format("2:4").mask_from_scores(importance.view(1, -1))
    dealt = importance[moves["o"][1]].view(1, -1)
    values = importance[:8].tolist()
    halves = ([half, [i for i in range(8) if i not in half]] for half in itertools.combinations(range(8), 4))
    best = max(sum(sum(sorted(values[i] for i in half)[2:]) for half in pair) for pair in halves)
    assert float(dealt[get_format("2:4").mask_from_scores(dealt)].sum()) == 2 * best
    assert float(importance.view(1, -1)[kept].sum()) < 2 * best
