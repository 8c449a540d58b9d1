"""One block in memory sees exactly what the whole model would have shown it."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, GPT2Config

import helpers
from sparse_rt.checkpoint import SourceCheckpoint
from sparse_rt.errors import UserError
from sparse_rt.pruning import BlockRunner, find_blocks

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "opt", "gemma3")


class Recorder(list):
    def add(self, x):
        self.append(x.clone())


def build(folder, family):
    if family != "gemma3":
        return helpers.tiny_model(folder, family)
    # Sliding and full attention take turns: blocks need masks and rotations of their own.
    config = Gemma3TextConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def empty_model(folder):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)


def linears(block):
    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def listen(linear, recorder):
    return linear.register_forward_pre_hook(lambda module, args: recorder.add(args[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_see_what_the_whole_model_shows_them(family, tmp_path):
    folder = build(tmp_path / family, family)
    tokens = torch.randint(1, 4000, (2, 24))
    runner = BlockRunner(empty_model(folder), SourceCheckpoint.open(folder).load)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    seen = {name: Recorder() for name, module in whole.named_modules() if isinstance(module, nn.Linear)}

    def replace(index, name):
        return torch.randint_like(whole.get_submodule(name).weight, 2) / 16

    runner.start(tokens)
    for index in range(len(runner.blocks)):
        assert all(parameter.is_meta for parameter in runner.model.parameters())
        names = linears(runner.open(index))
        found = {name: Recorder() for name in names}
        runner.collect(index, found)
        full = {name: f"{runner.block_name(index)}.{name}" for name in names}
        hooks = [
            whole.get_submodule(full[name]).register_forward_pre_hook(
                lambda m, args, s=seen[full[name]]: s.add(args[0])
            )
            for name in names
        ]
        with torch.no_grad():
            for sequence in tokens:
                whole(sequence.unsqueeze(0), use_cache=False)
        for hook in hooks:
            hook.remove()
        for name in names:
            assert len(found[name]) == len(tokens)
            assert all(
                torch.equal(a.flatten(), b.flatten()) for a, b in zip(found[name], seen[full[name]], strict=True)
            )
        changed = replace(index, full[names[0]])
        runner.set_weight(index, names[0], changed)
        whole.get_submodule(full[names[0]]).weight.data = changed
        runner.advance(index)
        runner.close(index)


def test_blocks_are_found_by_structure():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.helpers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.stack = nn.ModuleList(nn.Sequential(nn.ModuleList([nn.Linear(8, 8)])) for _ in range(2))

    name, blocks = find_blocks(Odd())
    assert name == "stack" and len(blocks) == 2
    with torch.device("meta"):
        gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(UserError, match="GPT2LMHeadModel keeps no decoder blocks in an nn.ModuleList"):
        find_blocks(gpt2)
