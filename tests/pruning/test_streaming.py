"""What calibration keeps: activations in memory or in a file, calls and statistics once however often they are used."""

import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import helpers
from sparse_rt.checkpoint import SourceCheckpoint
from sparse_rt.errors import SparseRTError
from sparse_rt.pruning import ActivationStats, BlockRunner, SharedStats
from sparse_rt.pruning.activations import Activations


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return helpers.tiny_llama(tmp_path_factory.mktemp("streaming") / "llama", num_hidden_layers=3)


def runner_of(folder, **options):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    return BlockRunner(model, SourceCheckpoint.open(folder).load, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_keeps_what_memory_keeps(dtype, tmp_path):
    tensors = [torch.randn(1, 5, 7).to(dtype) for _ in range(4)]
    kept = Activations(4, tmp_path), Activations(4)
    for activations in kept:
        for order in ((2, 0, 3, 1), (1,)):
            for index in order:
                activations[index] = tensors[index]
        assert len(activations) == 4
        assert all(torch.equal(found, tensor) for found, tensor in zip(activations, tensors, strict=True))
        other = activations.copy()
        activations[1] = tensors[0].double()  # a wider dtype widens all, losing nothing
        assert activations[1].dtype == activations[2].dtype == torch.float64
        assert torch.equal(activations[2], tensors[2].double()) and torch.equal(other[1], tensors[1])
        with pytest.raises(SparseRTError, match=r"the shape \(1, 5, 7\) into \(1, 6, 7\)"):
            activations[0] = torch.zeros(1, 6, 7)
    assert list(tmp_path.iterdir()) == []  # the file has no name: no crash can leave it


def test_a_full_disk_is_said_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    activations = Activations(1000, tmp_path)
    with pytest.raises(
        SparseRTError, match="1000 calibration sequences take 80,000 bytes, which .* no room for .No spa"
    ):
        activations[0] = torch.zeros(20)


def test_sequences_and_blocks_share_what_they_are_called_with(folder):
    kept = []
    for sequences in (1, 6):
        runner = runner_of(folder)
        runner.start(torch.randint(1, 4000, (sequences, 12)))
        kept.append(len(runner._calls.tensors))
        assert all(runner.call(index, s) is runner.call(index, 0) for index in range(3) for s in range(sequences))
    assert kept[0] == kept[1] > 0


def test_linears_with_one_input_share_their_statistics(folder):
    runner = runner_of(folder)
    runner.start(torch.randint(1, 4000, (3, 12)))
    block = runner.open(0)
    width = {name: m.in_features for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    shared = SharedStats(list(width), lambda name: ActivationStats(width[name], gram=True, expected_sequences=3))
    alone = {name: ActivationStats(n, gram=True, expected_sequences=3) for name, n in width.items()}
    runner.collect(0, shared.observers, begin=shared.begin)
    runner.collect(0, alone)
    shared.finish()
    groups = {frozenset(name.rpartition(".")[2].removesuffix("_proj") for name in group) for group in shared.groups()}
    assert groups == {frozenset("qkv"), frozenset("o"), frozenset(("gate", "up")), frozenset(("down",))}
    changed = shared.get("self_attn.q_proj")  # a copy of its own, so that the others stay as they are
    changed.gram.zero_()
    for name, stats in alone.items():
        found = shared.pop(name)
        assert found.sequences == 3 and found.tokens == 36
        if name != "self_attn.q_proj":
            assert torch.equal(found.gram, stats.gram) and torch.equal(found.input_norms(), stats.input_norms())
    assert shared.pop("self_attn.q_proj") is None


def test_an_input_that_is_shared_only_sometimes_is_refused():
    shared = SharedStats(["a", "b"], lambda name: ActivationStats(4))
    x = torch.randn(3, 4)
    shared.observers["a"].add(x)
    shared.observers["b"].add(x)
    shared.begin()
    shared.observers["a"].add(x)
    with pytest.raises(SparseRTError, match="b was called with the input of a for some calibration sequences"):
        shared.observers["b"].add(x.clone())
    lonely = SharedStats(["a", "b"], lambda name: ActivationStats(4))
    lonely.observers["a"].add(x)
    lonely.observers["b"].add(x.mul_(2))  # the same tensor, changed in place
    assert lonely.groups() == [["a"], ["b"]]


@pytest.mark.parametrize("order", ["qkv then kq", "qk then q then v", "q then q then kv", "qv then k again later"])
def test_a_linear_that_is_called_twice_for_a_sequence_leaves_the_others_alone(order):
    """Statistics are those of each linear's own calls, whoever shared its first input."""
    calls = {
        "qkv then kq": ["q0", "k0", "v0", "k1", "q1"],
        "qk then q then v": ["q0", "k0", "q1", "v0"],
        "q then q then kv": ["q0", "q1", "k0", "v0"],
        "qv then k again later": ["q0", "v0", "k0", "k1", "k1"],
    }[order]
    names = ["q", "k", "v"]
    shared = SharedStats(names, lambda name: ActivationStats(6, gram=True, expected_sequences=2))
    alone = {name: ActivationStats(6, gram=True, expected_sequences=2) for name in names}
    for _ in range(2):
        inputs = [torch.randn(5, 6), torch.randn(3, 6)]
        shared.begin()
        for name, number in calls:
            shared.observers[name].add(inputs[int(number)])
            alone[name].add(inputs[int(number)])
    shared.finish()
    for name in names:
        found = shared.pop(name)
        assert (found.sequences, found.tokens) == (alone[name].sequences, alone[name].tokens), name
        assert torch.equal(found.gram, alone[name].gram) and torch.equal(found.sample(), alone[name].sample()), name
