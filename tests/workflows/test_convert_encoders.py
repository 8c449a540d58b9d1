"""Encoders: built as the class their config names, calibrated block by block, their heads and poolers left dense."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import helpers
from sparse_rt import SPPConfig
from sparse_rt.checkpoint import Checkpoint, SourceCheckpoint
from sparse_rt.checkpoint.header import METADATA_KEY
from sparse_rt.config import BenchOptions, ConvertOptions, EvalOptions, GenerateOptions
from sparse_rt.data import read_texts, token_windows
from sparse_rt.errors import FormatError, UserError
from sparse_rt.exporters.dense import DenseExporter
from sparse_rt.formats import get_format
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.nn import sparse_linears
from sparse_rt.pruning import ActivationStats, find_blocks, get_pruner
from sparse_rt.workflows.bench import bench
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.eval import eval as evaluate
from sparse_rt.workflows.generate import generate

SAMPLES, LENGTH = 3, 32
HEAD = "outside of the"


def run(model, output, text, **options):
    options = {"num_samples": SAMPLES, "max_seq_len": LENGTH, "dataset": text, **options}
    return convert(ConvertOptions.build(model=str(model), output_dir=output, **options))


@torch.no_grad()
def prune_whole_model(folder, auto, method, text):
    """Transformers' model pruned in place, run as a whole for every block."""
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    fmt, pruner = get_format("2:4"), get_pruner(method)
    tokens = token_windows(read_texts(text), load_tokenizer(folder), LENGTH, SAMPLES, 0)
    for block in find_blocks(model)[1]:
        linears = [part for part in block.modules() if isinstance(part, nn.Linear)]
        stats = [ActivationStats(linear.in_features, gram=True) for linear in linears]
        hooks = [
            linear.register_forward_pre_hook(lambda module, args, seen=seen: seen.add(args[0]))
            for linear, seen in zip(linears, stats, strict=True)
        ]
        for sequence in tokens:
            model(sequence[None])
        for hook in hooks:
            hook.remove()
        for linear, seen in zip(linears, stats, strict=True):
            new, mask = pruner.prune(linear.weight, seen, fmt, None)
            linear.weight.copy_(torch.where(mask, new, 0.0))
    return model


CASES = [
    ("bert", "AutoModelForMaskedLM", "wanda", {"cls.predictions.transform.dense": HEAD}),
    ("bert", "AutoModel", "sparsegpt", {"pooler.dense": HEAD}),
    ("bert", "AutoModelForSequenceClassification", "wanda", {"bert.pooler.dense": HEAD, "classifier": HEAD}),
    ("roberta", "AutoModelForMaskedLM", "wanda", {"lm_head.dense": HEAD}),
    ("distilbert", "AutoModelForMaskedLM", "wanda", {"vocab_transform": HEAD}),
    ("deberta", "AutoModelForMaskedLM", "sparsegpt", {"cls.predictions.transform.dense": HEAD}),
    ("modernbert", "AutoModelForMaskedLM", "wanda", {"head.dense": HEAD}),
]


@pytest.mark.parametrize("family,auto,method,dense", CASES)
def test_calibrated_as_the_model_pruned_as_a_whole(family, auto, method, dense, text, tmp_path):
    source = helpers.tiny_model(tmp_path / "source", family, dtype=torch.float32, auto=auto)
    result = run(source, tmp_path / "out", text, method=method)
    expected, model = prune_whole_model(source, auto, method, text), load(tmp_path / "out")
    name, blocks = find_blocks(expected)
    pruned = model.get_submodule(name)
    linears = {name: module for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    assert type(model) is type(expected) and len(Checkpoint.open(tmp_path / "out").weights) == len(linears) >= 8
    for name, linear in linears.items():
        assert torch.equal(pruned.get_submodule(name).decompress(), linear.weight), name
    ids, mask = torch.arange(2, 26).view(2, 12) * 31, torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad():
        assert torch.allclose(model(ids, mask)[0], expected(ids, mask)[0], atol=1e-4)
    reasons = {entry["name"]: entry["reason"] for entry in result["skipped"]}
    assert reasons.keys() == dense.keys() and all(why in reasons[name] for name, why in dense.items())
    assert f"import {auto}," in (tmp_path / "out" / "README.md").read_text()


def test_heads_are_compressed_where_the_user_says_what_stays_dense(tmp_path, text):
    auto = "AutoModelForSequenceClassification"
    source = helpers.tiny_model(tmp_path / "source", "bert", auto=auto)
    result = run(source, tmp_path / "out", text, ignore=["classifier"])
    assert [entry["name"] for entry in result["skipped"]] == ["classifier"]
    assert load(tmp_path / "out").bert.pooler.dense.pattern == "2:4"
    (tmp_path / "dense").mkdir()
    DenseExporter().export(tmp_path / "out", tmp_path / "dense")
    figures = DenseExporter().check(tmp_path / "out", tmp_path / "dense")  # logits of a process without sparse_rt
    assert figures["weights_equal"] == 13


def test_a_head_that_the_checkpoint_has_and_the_class_has_not(tmp_path, text):
    """Published encoders often hold the pooler and both heads of their pretraining."""
    source = helpers.tiny_model(tmp_path / "source", "bert", auto="AutoModelForMaskedLM")
    whole = helpers.tiny_model(tmp_path / "whole", "bert", auto="AutoModelForPreTraining")
    (whole / "config.json").write_text((source / "config.json").read_text())
    result = run(whole, tmp_path / "out", text)
    reasons = {entry["name"]: entry["reason"] for entry in result["skipped"]}
    assert "the model has no parameter of this name" in reasons["bert.pooler.dense"]
    assert "bert.pooler.dense.weight" in Checkpoint.open(tmp_path / "out").tensors
    assert type(load(tmp_path / "out")).__name__ == "BertForMaskedLM"
    whole_again = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "out")
    stored = SourceCheckpoint.open(whole).load("bert.pooler.dense.weight")
    assert torch.equal(whole_again.bert.pooler.dense.weight, stored)


@pytest.mark.parametrize("auto", ["AutoModelForMaskedLM", "AutoModelForSequenceClassification"])
def test_blocks_that_draw_the_weights_of_their_layers_find_none_to_draw(tmp_path, text, auto):
    source = helpers.tiny_model(tmp_path / "source", "modernbert", auto=auto)
    run(source, tmp_path / "out", text, method="wanda", ignore=["classifier"])
    sparse = getattr(transformers, auto).from_pretrained(tmp_path / "out").eval()
    dense = load(tmp_path / "out", dequantize=True)
    ids = torch.arange(2, 26).view(2, 12) * 31
    with torch.no_grad():
        assert torch.allclose(sparse(ids)[0].float(), dense(ids)[0].float(), atol=1e-2)
    for name, parameter in transformers.AutoModel.from_pretrained(source).named_parameters():
        if "norm" in name:
            assert torch.equal(sparse.model.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("family", "auto", "head"),
    [
        ("bert", "AutoModelForMaskedLM", {"bert.pooler.dense", "classifier"}),
        ("modernbert", "AutoModelForMaskedLM", {"classifier"}),
        ("llama", "AutoModelForCausalLM", {"score"}),
    ],
)
def test_a_classifier_on_a_compressed_model_is_trained_merged_and_loaded_again(tmp_path, text, family, auto, head):
    """The head is new: transformers draws it, PEFT trains it whole beside the adapters, and it stays dense."""
    from peft import get_peft_model

    source = helpers.tiny_model(tmp_path / "source", family, dtype=torch.float32, auto=auto)
    run(source, tmp_path / "out", text, method="magnitude")
    compressed = len(Checkpoint.open(tmp_path / "out").weights)
    auto_class = transformers.AutoModelForSequenceClassification
    model = auto_class.from_pretrained(tmp_path / "out", num_labels=3)
    dense = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert head <= dense and all(model.get_submodule(name).weight.std() > 0 for name in head)
    masks = {name: module.metadata.clone() for name, module in sparse_linears(model)}
    assert len(masks) == compressed
    tuned = get_peft_model(model, SPPConfig(task_type="SEQ_CLS"))
    ids, labels = torch.arange(2, 50).view(4, 12) * 31, torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    merged = tuned.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "classifier")
    again = auto_class.from_pretrained(tmp_path / "classifier").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, merged(ids).logits)
    assert {name: module.metadata for name, module in sparse_linears(again)}.keys() == masks.keys()
    assert all(torch.equal(module.metadata, masks[name]) for name, module in sparse_linears(again))


LOST = [
    ("bert", "AutoModelForMaskedLM", "bert.encoder.layer.1.output.dense", "AutoModelForSequenceClassification"),
    (
        "albert",
        "AutoModelForMaskedLM",
        "albert.encoder.embedding_hidden_mapping_in",
        "AutoModelForSequenceClassification",
    ),
    ("opt", "AutoModelForCausalLM", "model.decoder.project_in", "AutoModel"),
]


@pytest.mark.parametrize(("family", "auto", "lost", "other"), LOST)
def test_a_layer_that_was_lost_does_not_pass_for_a_new_one(tmp_path, family, auto, lost, other):
    """Neither its tensors nor the header have it; config.json and the class that was converted say it was there."""
    sizes = {"word_embed_proj_dim": 32} if family == "opt" else {}
    source = helpers.tiny_model(tmp_path / "source", family, auto=auto, **sizes)
    options = dict(model=str(source), output_dir=tmp_path / "out", method="magnitude", ignore=["lm_head"])
    convert(ConvertOptions.build(**options))
    getattr(transformers, auto).from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    (file,) = (tmp_path / "again").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    sparse = json.loads(header[METADATA_KEY])
    del sparse["weights"][lost]
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(f"{lost}.weight")}
    save_file(tensors, file, metadata=header | {METADATA_KEY: json.dumps(sparse)})
    for class_name in (auto, other):
        with pytest.raises(FormatError, match=r"tensor [\w.]+\.weight_values is missing: config\.json announces a 2:4"):
            getattr(transformers, class_name).from_pretrained(tmp_path / "again")


def test_sequences_are_no_longer_than_the_positions_of_the_model(tmp_path, text):
    """RoBERTa's table of 258 positions begins with two that no token has."""
    source = helpers.tiny_model(tmp_path / "source", "roberta", auto="AutoModelForMaskedLM", pad_token_id=1)
    result = run(source, tmp_path / "out", text, method="wanda", num_samples=1, max_seq_len=2048)
    assert any("calibration sequences have 256 tokens" in note for note in result["notes"])


def test_what_encoders_cannot_do_is_said(tmp_path, text):
    source = helpers.tiny_model(tmp_path / "source", "bert", auto="AutoModelForMaskedLM")
    run(source, tmp_path / "out", text)
    with pytest.raises(UserError, match="is a BertForMaskedLM, which predicts no next token"):
        evaluate(EvalOptions.build(model=str(tmp_path / "out")))
    with pytest.raises(UserError, match="is a BertForMaskedLM, which predicts no next token"):
        generate(GenerateOptions.build(model=str(tmp_path / "out"), prompt="a"))
    with pytest.raises(UserError, match="is a BertForMaskedLM, which predicts no next token; bench times"):
        bench(BenchOptions.build(model=str(tmp_path / "out")))
    with pytest.raises(UserError, match="a BertForMaskedLM predicts no next token; give a text with --dataset FILE"):
        run(source, tmp_path / "self", "self", method="wanda")
    sizes = dict(embedding_size=32, num_hidden_layers=2, vocab_size=4096, hidden_size=64, intermediate_size=160)
    config = transformers.AlbertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    shared = transformers.AlbertForMaskedLM(config)
    shared.save_pretrained(tmp_path / "shared")
    for file in source.glob("token*"):
        shutil.copy(file, tmp_path / "shared")
    with pytest.raises(UserError, match="AlbertForMaskedLM runs 2 layers on 1 block"):
        run(tmp_path / "shared", tmp_path / "wanda", text, method="wanda")
    run(tmp_path / "shared", tmp_path / "magnitude", text)
    assert torch.isfinite(load(tmp_path / "magnitude")(torch.ones(1, 8, dtype=torch.long)).logits).all()
