"""Names of parameters and of checkpoint tensors: what transformers renames and joins while it loads."""

import torch
import transformers

import helpers
from sparse_rt.checkpoint import SourceCheckpoint
from sparse_rt.families import CheckpointNames, auto_class, empty_model


def test_modules_that_transformers_calls_otherwise_than_the_file(tmp_path):
    folder = helpers.tiny_model(tmp_path / "neox", "gpt_neox")
    tensors = SourceCheckpoint.open(folder).tensors
    names = CheckpointNames(empty_model(folder))
    assert "embed_out.weight" in tensors and names.parameter("embed_out.weight") == "lm_head.weight"
    assert all(names.parameter(key) in names.known for key in tensors)
    assert names.parameter("layers.0.mlp.dense_h_to_4h.weight") == "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    assert names.parameter("draft_head.weight") is None


def test_norms_of_old_checkpoints(tmp_path):
    folder = helpers.tiny_model(tmp_path / "bert", "bert", auto="AutoModelForMaskedLM")
    names = CheckpointNames(empty_model(folder))
    name = "bert.encoder.layer.0.output.LayerNorm"
    assert names.parameter(f"{name}.gamma") == f"{name}.weight" and names.parameter(f"{name}.beta") == f"{name}.bias"


def test_joined_parameters_are_those_that_transformers_loads(tmp_path):
    folder = helpers.tiny_model(tmp_path / "mixtral", "mixtral")
    checkpoint, loaded = SourceCheckpoint.open(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    names = CheckpointNames(empty_model(folder))
    joined = names.joined(checkpoint.tensors)
    assert set(joined) == {
        f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")
    }
    for name, parts in joined.items():
        assert torch.equal(names.join(name, parts, checkpoint.load), loaded.get_parameter(name))
        assert all(names.parameter(key) is None for key in parts)


def test_the_class_is_the_one_that_the_config_names():
    def named(config, *architectures):
        config.architectures = list(architectures)
        return auto_class(config).__name__

    assert named(transformers.BertConfig(), "BertForMaskedLM") == "AutoModelForMaskedLM"
    assert named(transformers.BertConfig(), "BertForSequenceClassification") == "AutoModelForSequenceClassification"
    assert named(transformers.BertConfig(), "BertModel") == "AutoModel"
    assert named(transformers.LlamaConfig(), "LlamaForSequenceClassification") == "AutoModelForSequenceClassification"
    # The body of a decoder is what its causal language model needs.
    assert (
        named(transformers.Qwen2Config(), "Qwen2Model") == named(transformers.Qwen2Config()) == "AutoModelForCausalLM"
    )
