"""Transformers models that serve from derived layouts: generation, saving, copies, offloading, adapters."""

import copy

import pytest
import torch

from packed_cases import TOLERANCE, error
from sparse_rt import SparseLinear, SPPConfig
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.hf.load import load
from sparse_rt.nn import PACK_VARIABLE, pack_weights, sparse_linears

IDS = torch.arange(5, 29).view(2, 12)


def is_packed(model):
    return {module.is_packed for _, module in sparse_linears(model)}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def generate(model, **options):
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False, **options)


def assert_stored(model, folder):
    """Every compressed tensor of ``model`` is that of ``folder``, bit for bit."""
    stored = Checkpoint.open(folder)
    assert len(stored.weights) == len(list(sparse_linears(model)))
    for name, module in sparse_linears(model):
        values, metadata = stored.load_weight(name)
        assert torch.equal(module.values, values) and torch.equal(module.metadata, metadata), name


def test_generation_packs_every_layer_and_says_the_same(sparse_llama, monkeypatch):
    """In float32, where no near tie of two tokens can hide behind rounding."""
    model = load(sparse_llama, dtype=torch.float32)
    assert is_packed(model) == {False}
    tokens = generate(model)
    assert is_packed(model) == {True}
    monkeypatch.setenv(PACK_VARIABLE, "0")
    canonical = load(sparse_llama, dtype=torch.float32)
    assert torch.equal(generate(canonical), tokens)
    assert is_packed(canonical) == {False}


def test_logits_differ_by_rounding_alone(sparse_llama, monkeypatch):
    model, canonical = load(sparse_llama), load(sparse_llama)
    served = logits(model)
    monkeypatch.setenv(PACK_VARIABLE, "0")
    assert error(served, logits(canonical).double()) <= 5 * TOLERANCE[torch.bfloat16]


def test_what_is_saved_after_generation_is_what_was_loaded(sparse_llama, tmp_path):
    model = load(sparse_llama)
    generate(model)
    assert is_packed(model) == {True}
    model.save_pretrained(tmp_path / "saved")
    first, second = Checkpoint.open(sparse_llama), Checkpoint.open(tmp_path / "saved")
    assert first.tensors.keys() == second.tensors.keys() and first.quantization == second.quantization
    for name in first.tensors:
        assert torch.equal(first.load(name), second.load(name)), name
    generate(model)
    assert is_packed(model) == {True}
    assert_stored(model, sparse_llama)


def test_copies_conversions_and_counts_after_generation(sparse_llama):
    model, fresh = load(sparse_llama), load(sparse_llama)
    generate(model)
    assert model.num_parameters() == fresh.num_parameters() and model.device.type == "cpu"
    assert model.get_memory_footprint() == fresh.get_memory_footprint() and model.dtype == fresh.dtype
    assert is_packed(model) == {True}
    assert_stored(copy.deepcopy(model), sparse_llama)
    generate(model)
    state, expected = model.state_dict(), fresh.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    generate(model)
    assert torch.equal(logits(model.to(torch.float32)), logits(fresh.to(torch.float32)))


def test_dequantizing_a_model_that_serves(sparse_llama):
    model = load(sparse_llama)
    generate(model)
    dense = model.dequantize()
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())
    assert torch.equal(logits(dense), logits(load(sparse_llama, dequantize=True)))


def test_layers_that_are_offloaded_to_disk_are_not_packed(sparse_llama, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(sparse_llama, device_map=device_map, offload_folder=tmp_path / "offload")
    first = logits(model)
    assert pack_weights(model.model.layers[1]) == 0
    assert model.model.layers[1].mlp.down_proj.weight_values.is_meta
    assert torch.equal(logits(model), first)
    assert error(first, logits(load(sparse_llama)).double()) <= 5 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("exact", [False, True])
def test_an_adapter_on_a_model_that_serves(sparse_llama, exact):
    """Serve, attach, train, serve again with and without the adapter: as if the model had never been packed."""
    peft = pytest.importorskip("peft")
    adapted, losses = [], []
    for serve_first in (True, False):
        model = load(sparse_llama, dtype=torch.float32)
        if serve_first:
            generate(model)
            assert is_packed(model) == {True}
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, SPPConfig(target_modules=["q_proj", "down_proj"], exact=exact))
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
        wrapped.train()
        for _ in range(3):
            loss = wrapped(IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wrapped.eval()
        adapted.append(wrapped)
        losses.append(loss.item())
    assert losses[0] == losses[1]
    served, other = adapted
    assert torch.equal(logits(served), logits(other))
    with served.disable_adapter():
        torch.testing.assert_close(
            logits(served), logits(load(sparse_llama, dtype=torch.float32)), rtol=1e-4, atol=1e-4
        )
    assert torch.equal(logits(served), logits(other)), "the adapter is back"
    assert not torch.allclose(logits(served), logits(load(sparse_llama, dtype=torch.float32)), atol=1e-3)
