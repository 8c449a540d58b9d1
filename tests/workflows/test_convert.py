"""convert: every family and method gives the weights the method says; odd sources are handled or refused in words."""

import json
import shutil
import struct

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

import helpers
from sparse_rt import assets
from sparse_rt.checkpoint import Checkpoint, partial_path
from sparse_rt.config import ConvertOptions
from sparse_rt.conversion import timing
from sparse_rt.data import read_texts, token_windows
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.pruning import ActivationStats, find_blocks, get_pruner
from sparse_rt.tools.convert import command
from sparse_rt.workflows.convert import convert

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "opt")
SAMPLES, LENGTH = 3, 24


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {family: helpers.tiny_model(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module", autouse=True)
def _short_text(tmp_path_factory):
    """Calibration text of a few kilobytes: tokenizing the shipped one would take most of these tests' time."""
    global TEXT
    TEXT = tmp_path_factory.mktemp("text") / "calibration.txt"
    TEXT.write_text(assets.calibration_text().read_text()[:6000])


def run(model, output, **options):
    options = {"num_samples": SAMPLES, "max_seq_len": LENGTH, "dataset": str(TEXT), **options}
    return convert(ConvertOptions.build(model=str(model), output_dir=output, **options))


def edit_weights(folder, change):
    """Apply ``change`` to the dictionary of tensors of a dense folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def block_linears(model):
    name, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        yield {f"{name}.{index}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def prune_whole_model(folder, method, pattern, sparsity):
    """The dense model pruned in place, run as a whole for every block: the reference for streaming."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    fmt, pruner, tokenizer = get_format(pattern), get_pruner(method), load_tokenizer(folder)
    tokens = token_windows(read_texts(TEXT), tokenizer, LENGTH, SAMPLES, 0)
    for linears in block_linears(model):
        stats = {name: ActivationStats(m.in_features, gram=True) for name, m in linears.items()}
        hooks = [
            m.register_forward_pre_hook(lambda module, args, s=stats[name]: s.add(args[0]))
            for name, m in linears.items()
        ]
        if pruner.needs_calibration:
            for sequence in tokens:
                model(sequence.unsqueeze(0), use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            new, mask = pruner.prune(linear.weight, stats[name], fmt, sparsity)
            linear.weight.data = torch.where(mask, new, 0.0).to(linear.weight.dtype)
    return model


CASES = [("magnitude", "unstructured"), ("wanda", "2:4"), ("sparsegpt", "unstructured")]
CASES_LLAMA = [("magnitude", "2:4"), ("wanda", "unstructured"), ("sparsegpt", "4:8")]
CASES_LLAMA += [("alps", "2:4"), ("admm", "unstructured"), ("magnitude+admm+pcg", "4:8")]


@pytest.mark.parametrize(
    "family,method,pattern", [(f, *case) for f in FAMILIES for case in CASES] + [("llama", *c) for c in CASES_LLAMA]
)
def test_streaming_gives_the_weights_of_the_model_pruned_as_a_whole(families, family, method, pattern, tmp_path):
    sparsity = {"sparsity": 0.6} if pattern == "unstructured" else {}
    result = run(families[family], tmp_path / "out", method=method, pattern=pattern, **sparsity)
    expected = prune_whole_model(families[family], method, pattern, 0.6)
    model = load(tmp_path / "out")
    dense = dict(expected.named_modules())
    for name in Checkpoint.open(tmp_path / "out").weights:
        assert torch.equal(model.get_submodule(name).decompress(), dense[name].weight), name
    ids = torch.randint(1, 4000, (2, 16))
    with torch.no_grad():
        logits, reference = model(ids).logits, expected(ids).logits
    assert torch.isfinite(logits).all() and torch.allclose(logits.float(), reference.float(), atol=0.05)
    assert result["mean_sparsity"] == pytest.approx(0.6 if sparsity else 0.5, abs=0.01)
    assert len(result["sparsity"]) == 2 * (6 if family == "opt" else 7)
    if method != "magnitude":
        assert result["reconstruction_error"].keys() == result["sparsity"].keys()
        assert 0 < result["mean_reconstruction_error"] < 1


def test_result_config_card_and_copied_files(families, tmp_path):
    (source := tmp_path / "llama") and shutil.copytree(families["llama"], source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"old weights")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Llama")
    result = run(source, tmp_path / "out", overrides={"down_proj": "4:8", "re:.*layers.1.*o_proj": "unstructured"})
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "tokenizer.json", "generation_config.json", "README.md"} <= names
    assert "pytorch_model.bin" not in names
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["ignore"] == ["lm_head"] and quantization["pattern"] == "2:4"
    weights = Checkpoint.open(tmp_path / "out").weights
    assert weights["model.layers.0.mlp.down_proj"].pattern == "4:8"
    assert weights["model.layers.1.self_attn.o_proj"].pattern == "unstructured"
    assert weights["model.layers.1.self_attn.o_proj"].sparsity == 0.5
    linear = 2 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160)
    head = 2 * 4096 * 64
    assert result["coverage_percent"] == round(100 * linear / (linear + head), 2)
    assert result["compressed_bytes"] == sum(
        entry.nbytes for entry in Checkpoint.open(tmp_path / "out").tensors.values()
    )
    assert result["dense_bytes"] == sum(t.nbytes for t in load_file(source / "model.safetensors").values())
    assert result["skipped"] == [{"name": "lm_head", "shape": [4096, 64], "reason": "ignored"}]
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "license: apache-2.0",
        "import sparse_rt",
        "vllm serve",
        "| method | magnitude |",
        "`lm_head`: ignored",
    ):
        assert words in card
    manifest = json.loads((tmp_path / "out" / "sparse_rt.manifest.json").read_text())
    assert manifest["options"]["overrides"]["down_proj"] == "4:8"
    assert manifest["source"]["kind"] == "dense" and len(manifest["source"]["digest"]) == 64
    assert {entry.suffix for entry in tmp_path.iterdir()} == {""} and not partial_path(tmp_path / "out").exists()


def test_what_stays_dense_and_why(families, tmp_path):
    odd = helpers.tiny_llama(tmp_path / "odd", intermediate_size=162)
    result = run(odd, tmp_path / "out", ignore=["lm_head", "re:.*k_proj"])
    reasons = {entry["name"]: entry["reason"] for entry in result["skipped"]}
    assert reasons["model.layers.0.mlp.down_proj"] == "162 columns are not a multiple of 4"
    assert reasons["model.layers.1.self_attn.k_proj"] == "ignored"
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(ignore) == set(reasons) and len(reasons) == 5
    assert torch.isfinite(load(tmp_path / "out")(torch.ones(1, 4, dtype=torch.long)).logits).all()
    tied = run(families["qwen2"], tmp_path / "tied", ignore=[])
    assert tied["coverage_percent"] == 100.0
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    calibrated = run(families["llama"], tmp_path / "head", ignore=[], method="wanda")
    assert "outside of the decoder blocks" in calibrated["skipped"][0]["reason"]


def test_a_checkpoint_without_the_head_and_in_shards(families, tmp_path):
    body = AutoModel.from_pretrained(families["qwen2"], dtype="auto")
    body.save_pretrained(tmp_path / "body", max_shard_size="300kB")
    assert len(list((tmp_path / "body").glob("*.safetensors"))) > 1
    run(tmp_path / "body", tmp_path / "out", pattern="unstructured", sparsity=0.25)
    weights = Checkpoint.open(tmp_path / "out").weights
    assert len(weights) == 14 and "layers.0.mlp.up_proj" in weights
    model, reference = load(tmp_path / "out"), prune_whole_model(families["qwen2"], "magnitude", "unstructured", 0.25)
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(model.get_submodule(name).decompress(), reference.get_submodule(name).weight)


def test_none_keeps_pruned_weights_bit_for_bit(families, tmp_path):
    source = tmp_path / "pruned"
    prune_whole_model(families["llama"], "magnitude", "2:4", None).save_pretrained(source)
    edit_weights(source, lambda t: t["model.layers.0.mlp.up_proj.weight"][0].fill_(-0.0))  # a row of negative zeros
    run(source, tmp_path / "out", method="none")
    before = load_file(source / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "out")
    for name, entry in checkpoint.weights.items():
        values, metadata = checkpoint.load_weight(name)
        dense = get_format("2:4").decompress(values, metadata, entry.m, entry.n)
        assert torch.equal(dense, before[f"{name}.weight"])
        assert not torch.signbit(values[values == 0]).any()
    for name in checkpoint.dense_tensors():
        assert torch.equal(checkpoint.load(name), before[name])


def test_none_refuses_what_is_not_pruned(families, tmp_path):
    with pytest.raises(FormatError, match=r"layers\.0\.\S+ does not obey the pattern 2:4: row 0, columns 0\.\.3 hold"):
        run(families["llama"], tmp_path / "out", method="none", pattern="2:4")
    for options in ({}, {"pattern": "auto"}, {"pattern": "unstructured", "ignore": []}):
        with pytest.raises(UserError, match="nothing to compress in .* density of .*, and 0.85 is allowed; prune it"):
            run(families["llama"], tmp_path / "out", method="none", **options)
    assert list(tmp_path.iterdir()) == []


def test_none_leaves_single_dense_weights_dense(families, tmp_path):
    source = tmp_path / "pruned"
    prune_whole_model(families["llama"], "magnitude", "unstructured", 0.5).save_pretrained(source)
    name = "model.layers.1.mlp.gate_proj"
    edit_weights(source, lambda t: t[f"{name}.weight"].fill_(0.5))
    result = run(source, tmp_path / "out", method="none", pattern="unstructured")
    assert [entry["name"] for entry in result["skipped"]] == ["lm_head", name]
    assert "density 1.0000 is above 0.85" in result["skipped"][1]["reason"]
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert name in quantization["ignore"] and name not in Checkpoint.open(tmp_path / "out").weights
    assert torch.isfinite(load(tmp_path / "out")(torch.ones(1, 4, dtype=torch.long)).logits).all()


def test_a_cast_never_changes_the_mask(families, tmp_path):
    source = tmp_path / "small"
    shutil.copytree(families["llama"], source)
    name = "model.layers.0.self_attn.q_proj"
    tiny = torch.full((64, 64), 1e-12, dtype=torch.bfloat16)
    edit_weights(source, lambda t: t.update({f"{name}.weight": tiny}))
    run(source, tmp_path / "out", pattern="unstructured", sparsity=0.75, dtype="float16")
    checkpoint = Checkpoint.open(tmp_path / "out")
    values, _ = checkpoint.load_weight(name)
    assert values.numel() == 1024 and values.dtype == torch.float16 and not values.any()
    assert {checkpoint.load(n).dtype for n in checkpoint.dense_tensors()} == {torch.float16}
    assert load(tmp_path / "out").dtype == torch.float16
    edit_weights(source, lambda t: t[f"{name}.weight"].fill_(1e6))
    with pytest.raises(FormatError, match=r"q_proj.weight: 999424 does not fit into torch.float16; use --dtype bf"):
        run(source, tmp_path / "overflow", dtype="float16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_nan_and_inf_are_refused_with_their_position(families, tmp_path, value, method):
    source = tmp_path / "damaged"
    shutil.copytree(families["llama"], source)
    edit_weights(source, lambda t: t["model.layers.1.mlp.down_proj.weight"][3].index_fill_(0, torch.tensor(7), value))
    with pytest.raises(FormatError, match=rf"layers.1.mlp.down_proj.weight holds {value} at position \(3, 7\)"):
        run(source, tmp_path / "out", method=method)
    assert {entry.name for entry in tmp_path.iterdir()} == {"damaged"}


def test_sources_that_cannot_be_converted(families, sparse_llama, tmp_path):
    with pytest.raises(UserError, match="is a sparse-rt model already, there is nothing to convert"):
        run(sparse_llama, tmp_path / "out")
    for section, words in (
        ({"quant_method": "gptq", "bits": 4}, "is stored by gptq"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {}}},
            "is stored by compressed-tensors",
        ),
    ):
        shutil.copytree(families["llama"], tmp_path / "quantized", dirs_exist_ok=True)
        config = json.loads((families["llama"] / "config.json").read_text()) | {"quantization_config": section}
        (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=words):
            run(tmp_path / "quantized", tmp_path / "out")
    (tmp_path / "pickle").mkdir()
    shutil.copy(families["llama"] / "config.json", tmp_path / "pickle")
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="pytorch_model.bin is no file of torch.save, or damaged"):
        run(tmp_path / "pickle", tmp_path / "out")
    with pytest.raises(UserError, match="holds the source model; choose another"):
        run(families["llama"], families["llama"], overwrite=True)
    shutil.copytree(families["llama"], tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="wanda calibrates on text, and .* has no tokenizer"):
        run(tmp_path / "mute", tmp_path / "out", method="wanda")
    assert not (tmp_path / "out").exists() and not partial_path(tmp_path / "out").exists()


def test_options_that_cannot_work(families, tmp_path):
    for options, words in (
        ({"sparsity": 0.7}, "sparsity 0.7 contradicts the pattern 2:4, which removes 0.5"),
        ({"pattern": "5:4"}, "need 0 < N < M"),
        ({"method": "wandb"}, "Unknown pruner 'wandb'"),
        ({"dtype": "int8"}, "dtype 'int8' is not known"),
        ({"overrides": {"q_prj": "4:8"}}, "--overrides q_prj: no linear module has this name"),
        ({"overrides": {"q_proj": "4:9:1"}}, "Unknown pattern '4:9:1'"),
        ({"ignore": ["re:.*"]}, "nothing to compress in .*: ignored"),
        ({"max_shard_size": "5 apples"}, "is not a size"),
    ):
        with pytest.raises(UserError, match=words):
            run(families["llama"], tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
    options = {"ignore": ["lm_head", "no_such"], "method": "wanda", "max_seq_len": 4096}
    notes = run(families["llama"], tmp_path / "out", **options)["notes"]
    assert notes[0] == "--ignore no_such: no linear module has this name"
    assert "calibration sequences have 256 tokens" in notes[1]


def test_patterns_stay_text_on_the_command_line(families, tmp_path):
    """YAML reads 4:8 as the number 248."""
    arguments = ["--overrides", "down_proj=4:8", "--overrides", "o_proj=unstructured", "--sparsity", "0.75", "--quiet"]
    outcome = CliRunner().invoke(command, [str(families["llama"]), "-o", str(tmp_path / "out"), *arguments])
    assert outcome.exit_code == 0, outcome.output
    weights = Checkpoint.open(tmp_path / "out").weights
    assert weights["model.layers.0.mlp.down_proj"].pattern == "4:8"
    assert weights["model.layers.0.self_attn.o_proj"].sparsity == 0.75
    with pytest.raises(UserError, match="pattern 248 is a number; YAML reads"):
        run(families["llama"], tmp_path / "yaml", overrides={"down_proj": 248})


def test_dry_run_reads_headers_only(tmp_path, monkeypatch):
    """A 140 GB Llama of holes: one read of its data would take minutes and give a different plan than its header."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=32000, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path / "big")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    header, offset = {}, 0
    for name, tensor in model.state_dict().items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    monkeypatch.setattr(timing, "COLUMNS", 256)  # short trials
    monkeypatch.setattr(timing, "BLOCK_PRODUCTS", 1e10)
    text = json.dumps(header).encode()
    with (tmp_path / "big" / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    result = run(
        tmp_path / "big", tmp_path / "out", method="sparsegpt", num_samples=128, max_seq_len=2048, dry_run=True
    )
    assert result["dense_bytes"] == offset > 137e9
    head = 2 * 32000 * 8192
    assert result["linear_bytes"] == offset - head - 2 * 8192 * 161
    expected = (result["linear_bytes"] - head) * 9 // 16 + 2 * head + 2 * 8192 * 161
    assert result["compressed_bytes"] == expected
    assert result["needed_disk_bytes"] == expected + 5 * 10**9
    block = 2 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672 + 2 * 8192)
    memory = result["estimated_peak_memory_bytes"]
    assert memory["block"] == block and memory["activations"] == 2 * 128 * 2048 * 8192
    assert memory["total"] < 40e9
    seconds = result["estimated_seconds"]
    assert set(seconds) == {"forward", "prune", "disk", "total"} and min(seconds.values()) > 0
    assert seconds["total"] == pytest.approx(sum(seconds.values()) / 2, abs=0.02)
    modules = {module["name"]: module for module in result["modules"]}
    assert len(modules) == 561 and modules["lm_head"]["reason"] == "ignored"
    assert [entry.name for entry in tmp_path.iterdir()] == ["big"]


def test_tensors_under_other_names_stay_dense_and_loadable(families, tmp_path):
    """Layers beyond the model's own (draft heads) are in the file, transformers does not use them."""
    source = tmp_path / "extra"
    shutil.copytree(families["llama"], source)
    name = "model.layers.2.mlp.up_proj"
    edit_weights(source, lambda t: t.update({f"{name}.weight": torch.randn(160, 64).to(torch.bfloat16)}))
    result = run(source, tmp_path / "out")
    reasons = {entry["name"]: entry["reason"] for entry in result["skipped"]}
    assert "the model has no parameter of this name" in reasons[name]
    assert result["coverage_percent"] < run(families["llama"], tmp_path / "plain")["coverage_percent"]
    assert torch.isfinite(load(tmp_path / "out")(torch.ones(1, 4, dtype=torch.long)).logits).all()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "wanda+admm", "alps"])
def test_on_a_gpu(families, method, tmp_path):
    """The same weights but for rounding, which what sparsegpt and alps decide one after the other multiplies."""
    decided_in_turn = method in ("sparsegpt", "alps")
    run(families["llama"], tmp_path / "gpu", method=method, device="cuda")
    run(families["llama"], tmp_path / "cpu", method=method, device="cpu")
    gpu, cpu = (Checkpoint.open(tmp_path / name) for name in ("gpu", "cpu"))
    equal = {n: (gpu.load_weight(n)[1] == cpu.load_weight(n)[1]).float().mean().item() for n in cpu.weights}
    assert min(equal.values()) > (0.8 if decided_in_turn else 0.99), equal
    tokens = torch.randint(0, 100, (4, 32))
    dense, *sparse = (load(folder)(tokens).logits for folder in (families["llama"], tmp_path / "gpu", tmp_path / "cpu"))
    on_gpu, on_cpu = (float((logits - dense).norm()) for logits in sparse)
    assert on_gpu == pytest.approx(on_cpu, rel=0.1)


def test_the_shipped_model_by_default_options(tmp_path):
    result = convert(ConvertOptions.build(model=str(assets.model_dir()), output_dir=tmp_path / "out"))
    assert result["coverage_percent"] == 100.0 and result["mean_sparsity"] == 0.5
    assert result["ratio"] == pytest.approx(0.66, abs=0.01)
