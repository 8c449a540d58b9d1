"""convert --method none without a pattern: what the zeros of each weight obey is found, reported and written down."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import helpers
from sparse_rt.checkpoint import Checkpoint, SourceCheckpoint, file_digest
from sparse_rt.config import ConvertOptions, ExportOptions
from sparse_rt.errors import UserError
from sparse_rt.formats import get_format
from sparse_rt.hf.load import load
from sparse_rt.progress import Progress
from sparse_rt.tools.convert import command
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.export import export


def run(model, output, **options):
    return convert(ConvertOptions.build(model=str(model), output_dir=output, **{"method": "none", **options}))


def prune(tensor, pattern, sparsity=0.5):
    return torch.where(get_format(pattern).mask_from_scores(tensor.float().abs(), sparsity), tensor, 0)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A Llama as others leave them: (folder, what each weight is)."""
    folder = helpers.tiny_llama(tmp_path_factory.mktemp("mixed") / "model", num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    block = "model.layers.2.mlp"
    down = prune(tensors[f"{block}.gate_proj.weight"].T, "2:4").T.contiguous()
    for name, tensor in tensors.items():
        if "_proj" not in name:
            continue
        pattern = "unstructured" if "down_proj" in name else "1:4" if "layers.1.self_attn.v" in name else "2:4"
        tensors[name] = prune(tensor, pattern, 0.7)
        expected[name.removesuffix(".weight")] = pattern
    tensors[f"{block}.gate_proj.weight"] = down
    expected[f"{block}.gate_proj"] = "unstructured"
    tensors[f"{block}.up_proj.weight"].fill_(0.5)
    expected[f"{block}.up_proj"] = None
    attention = "model.layers.0.self_attn"
    tensors[f"{attention}.q_proj.weight"][5:9] = -0.0
    tensors[f"{attention}.k_proj.weight"].zero_()
    expected[f"{attention}.k_proj"] = "unstructured"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "recipe.yaml").write_text("test_stage:\n  pruning_modifiers:\n    ConstantPruningModifier: {}\n")
    return folder, expected


def test_each_weight_has_its_own_pattern(mixed, tmp_path):
    source, expected = mixed
    result = run(source, tmp_path / "out")
    assert result["patterns"] == {"2:4": 14, "unstructured": 5, "1:4": 1} and result["options"]["pattern"] == "auto"
    assert {entry["name"]: entry["reason"] for entry in result["skipped"]} == {
        "lm_head": "ignored",
        "model.layers.2.mlp.up_proj": "it has no zeros: the weight is not pruned",
    }
    (note,) = [note for note in result["notes"] if "down their columns" in note]
    assert note.startswith("1 weights, model.layers.2.mlp.gate_proj for one, obey 2:4 down their columns")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert {n: checkpoint.weights[n].pattern for n, p in expected.items() if p} == {
        n: p for n, p in expected.items() if p
    }
    assert checkpoint.quantization.pattern == "2:4" and len(checkpoint.quantization.overrides) <= 4
    assert checkpoint.weights["model.layers.0.self_attn.k_proj"].nnz == 0
    assert torch.isfinite(load(tmp_path / "out")(torch.ones(1, 4, dtype=torch.long)).logits).all()


def test_back_to_dense_is_the_source_bit_for_bit(mixed, tmp_path):
    source, _ = mixed
    run(source, tmp_path / "out")
    export(ExportOptions.build(model=str(tmp_path / "out"), output_dir=tmp_path / "dense", to="dense"))
    before, after = SourceCheckpoint.open(source), SourceCheckpoint.open(tmp_path / "dense")
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        a, b = before.load(name), after.load(name)
        assert torch.equal((a + 0.0).view(torch.int16), b.view(torch.int16)), name  # + 0.0: -0.0 becomes +0.0


def test_the_command_line_tells_the_patterns(mixed, tmp_path):
    source, _ = mixed
    arguments = [str(source), "-o", str(tmp_path / "out"), "--method", "none", "--pattern", "auto"]
    outcome = CliRunner().invoke(command, [*arguments, "--json", str(tmp_path / "result.json")])
    assert outcome.exit_code == 0, outcome.output
    assert "patterns of the compressed weights: 14 2:4, 5 unstructured, 1 1:4" in outcome.output
    assert json.loads((tmp_path / "result.json").read_text())["patterns"]["2:4"] == 14


def test_a_pattern_that_was_asked_for_wins(mixed, tmp_path):
    source, expected = mixed
    result = run(source, tmp_path / "out", overrides={"v_proj": "unstructured"})
    weights = Checkpoint.open(tmp_path / "out").weights
    assert {weights[name].pattern for name in expected if "v_proj" in name} == {"unstructured"}
    assert result["patterns"] == {"2:4": 12, "unstructured": 8}
    whole = run(source, tmp_path / "whole", pattern="unstructured", ignore=["lm_head"])
    assert set(whole["patterns"]) == {"unstructured"}


def test_a_2_4_model_gives_the_bytes_that_the_option_gives(dense_llama, tmp_path):
    source = shutil.copytree(dense_llama, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    pruned = {name: prune(t, "2:4") if "_proj" in name else t for name, t in tensors.items()}
    save_file(pruned, source / "model.safetensors", metadata={"format": "pt"})
    run(source, tmp_path / "auto")
    run(source, tmp_path / "given", pattern="2:4")
    name = "sparse_rt-00001-of-00001.safetensors"
    assert file_digest(tmp_path / "auto" / name) == file_digest(tmp_path / "given" / name)
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("auto", "given")]
    assert configs[0] == configs[1] and configs[0]["quantization_config"]["overrides"] == {}


class Interrupt(Progress):
    """Ctrl-C after some tensors."""

    def __init__(self, after):
        self.after = after

    def track(self, items, description, total=None):
        for number, item in enumerate(items):
            if number == self.after:
                raise KeyboardInterrupt
            yield item


def test_interrupted_and_resumed_equals_uninterrupted(mixed, tmp_path):
    source, _ = mixed
    fields = dict(model=str(source), method="none", max_shard_size="20kB")
    for after in (12, 28):  # the second goes on with the first
        chosen = ConvertOptions.build(output_dir=tmp_path / "out", resume=after == 28, **fields)
        with pytest.raises(KeyboardInterrupt):
            convert(chosen, Interrupt(after))
    resumed = convert(ConvertOptions.build(output_dir=tmp_path / "out", resume=True, **fields))
    straight = convert(ConvertOptions.build(output_dir=tmp_path / "straight", **fields))
    found = [{f.name: file_digest(f) for f in (tmp_path / name).iterdir()} for name in ("out", "straight")]
    assert found[0] == found[1]
    assert (resumed["patterns"], resumed["notes"]) == (straight["patterns"], straight["notes"])


def test_dry_run_says_that_the_data_decides(mixed, tmp_path):
    source, _ = mixed
    result = run(source, tmp_path / "out", dry_run=True)
    assert {module["pattern"] for module in result["modules"]} == {"auto", None}
    assert any("reads the zeros of each weight when it converts it" in note for note in result["notes"])


def test_a_model_without_zeros_is_refused_before_anything_is_written(dense_llama, tmp_path):
    with pytest.raises(UserError, match=r"nothing to compress in .*: it is not pruned, .*--method magnitude"):
        run(dense_llama, tmp_path / "out")
    with pytest.raises(UserError, match="--pattern auto finds the pattern of a model that is pruned already, and --m"):
        run(dense_llama, tmp_path / "out", method="magnitude", pattern="auto")
    with pytest.raises(UserError, match="Unknown pattern 'auto'"):
        run(dense_llama, tmp_path / "out", overrides={"v_proj": "auto"})
    assert list(tmp_path.iterdir()) == []


def test_overrides_that_contradict_each_other_are_written_without_an_order(dense_llama, tmp_path):
    """The first that fits a weight counts, and config.json does not keep their order."""
    overrides = {"re:.*layers.1.*": "4:8", "down_proj": "unstructured"}
    run(dense_llama, tmp_path / "out", method="magnitude", overrides=overrides)
    weights = Checkpoint.open(tmp_path / "out").weights
    assert weights["model.layers.1.mlp.down_proj"].pattern == weights["model.layers.1.mlp.up_proj"].pattern == "4:8"
    assert weights["model.layers.0.mlp.down_proj"].pattern == "unstructured"
    assert weights["model.layers.0.mlp.up_proj"].pattern == "2:4"
