"""Experts with layers of their own compute what the fused ones did; what cannot be taken apart stays, with a reason."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers.models.mixtral import modeling_mixtral

import helpers
from sparse_rt.checkpoint import SourceCheckpoint
from sparse_rt.families import CheckpointNames, SplitExperts, empty_model, split_experts

FAMILIES = ("mixtral", "qwen3_moe")
IDS = torch.arange(1, 25).view(2, 12) * 31


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return helpers.tiny_model(tmp_path_factory.mktemp(request.param), request.param, dtype=torch.float32)


def split(folder, **changed):
    """(the empty model of ``folder``, why its experts stayed as they are), for a checkpoint with ``changed`` shapes."""
    model = empty_model(folder)
    shapes = {key: entry.shape for key, entry in SourceCheckpoint.open(folder).tensors.items()} | changed
    return model, split_experts(model, CheckpointNames(model), shapes)


def filled(folder):
    """The split model with the weights of the checkpoint, without transformers' loader."""
    model, _ = split(folder)
    names, checkpoint = CheckpointNames(model), SourceCheckpoint.open(folder)
    state = {names.parameter(key): checkpoint.load(key) for key in checkpoint.tensors}
    model.load_state_dict(state, assign=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.model.rotary_emb = whole.model.rotary_emb
    return model.eval(), whole.eval()


@torch.no_grad()
def test_they_compute_what_the_fused_experts_do(folder):
    model, whole = filled(folder)
    assert sum(isinstance(module, SplitExperts) for module in model.modules()) == 2
    expected = whole(IDS).logits
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(one(IDS).logits, expected, atol=1e-5)
    twin = copy.deepcopy(model)
    for linear in (m for n, m in twin.named_modules() if ".experts." in n and isinstance(m, nn.Linear)):
        linear.weight.zero_()
    assert not torch.allclose(twin(IDS).logits, expected, atol=1e-3)  # the copy reads its own weights
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)


def test_every_expert_gets_gradients_of_its_own(folder):
    model, whole = filled(folder)
    model(IDS).logits.square().mean().backward()
    whole(IDS).logits.square().mean().backward()
    experts, fused = model.model.layers[0].mlp.experts, whole.model.layers[0].mlp.experts
    gate = "w1" if "Mixtral" in type(experts).__name__ else "gate_proj"
    grads = [experts.get_submodule(f"{index}.{gate}").weight.grad for index in range(experts.num_experts)]
    expected = fused.gate_up_proj.grad[:, : grads[0].shape[0]]
    assert torch.allclose(
        torch.stack([torch.zeros_like(expected[0]) if g is None else g for g in grads]), expected, atol=1e-6
    )


def reasons(folder, **changed):
    return set(split(folder, **changed)[1].values())


def test_experts_stay_fused_where_their_code_multiplies_otherwise(tmp_path, monkeypatch):
    folder = helpers.tiny_model(tmp_path / "model", "mixtral")
    assert reasons(folder) == {None}

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states @ self.gate_up_proj[0].T @ self.gate_up_proj[0]

    monkeypatch.setattr(modeling_mixtral.MixtralExperts, "forward", forward)
    assert reasons(folder) == {"its forward does not multiply expert by expert"}


def test_experts_stay_fused_where_there_is_more_than_their_weights(tmp_path, monkeypatch):
    folder = helpers.tiny_model(tmp_path / "model", "mixtral")
    initialise = modeling_mixtral.MixtralExperts.__init__

    def with_bias(self, config):
        initialise(self, config)
        self.down_proj_bias = nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(modeling_mixtral.MixtralExperts, "__init__", with_bias)
    assert [reason.endswith("experts.down_proj_bias besides") for reason in reasons(folder)] == [True, True]


def test_experts_stay_fused_where_the_shapes_do_not_fit(tmp_path):
    folder = helpers.tiny_model(tmp_path / "model", "mixtral")
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    found = split(folder, **{name: (64, 96)})[1]
    assert found == {
        "model.layers.0.mlp.experts": "its tensors are not the rows of one expert's matrix",
        "model.layers.1.mlp.experts": None,
    }
