"""compressed-tensors checkpoints, which nothing else loads any more, convert bit for bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import helpers
from legacy_folders import compressed_tensors_folder
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import ConvertOptions, InspectOptions, VerifyOptions
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.hf.load import load
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.inspect import inspect
from sparse_rt.workflows.verify import verify


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Builds a compressed-tensors folder: (folder, dense weights, masks)."""
    folder = tmp_path_factory.mktemp("ct")
    dense = helpers.tiny_llama(folder / "dense", intermediate_size=156)  # 156 columns: padding bits in the bitmask

    def build(kind, **config_changes):
        target = folder / f"{kind}-{len(config_changes)}"
        if target.exists():
            shutil.rmtree(target)
        return target, *compressed_tensors_folder(dense, target, kind, **config_changes)

    return build


def run(model, output, **options):
    return convert(ConvertOptions.build(model=str(model), output_dir=output, **{"method": "none", **options}))


@pytest.mark.parametrize(
    "kind,pattern", [("sparse-bitmask", "unstructured"), ("old", "unstructured"), ("sparse-24-bitmask", "2:4")]
)
def test_masks_and_values_are_taken_bit_for_bit(make, kind, pattern, tmp_path):
    source, weights, masks = make(kind)
    result = run(source, tmp_path / "out", pattern=pattern)
    assert result["source"]["kind"] == "compressed-tensors" and len(result["sparsity"]) == 14
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert not {"compression_config", "sparsity_config"} & checkpoint.config.keys()
    for name, weight in weights.items():
        entry = checkpoint.weights[name.removesuffix(".weight")]
        values, metadata = checkpoint.load_weight(name.removesuffix(".weight"))
        fmt = get_format(pattern)
        assert torch.equal(fmt.unpack_mask(metadata, entry.m, entry.n), masks[name])
        assert torch.equal(fmt.decompress(values, metadata, entry.m, entry.n), weight)
    against = verify(VerifyOptions(model=str(tmp_path / "out"), against=str(source)))["against"]
    assert against["masks"]["identical"] == against["values_equal"] == 14
    assert torch.isfinite(load(tmp_path / "out")(torch.ones(1, 4, dtype=torch.long)).logits).all()
    found = inspect(InspectOptions(model=str(source)))
    assert found["kind"] == "compressed-tensors" and found["suggestion"].endswith(f"--pattern {pattern}")


def test_dry_run_knows_the_size(make, tmp_path):
    source, _, _ = make("sparse-bitmask")
    planned = run(source, tmp_path / "out", pattern="unstructured", dry_run=True)
    assert planned["compressed_bytes"] == run(source, tmp_path / "out", pattern="unstructured")["compressed_bytes"]
    with pytest.raises(FormatError, match="does not obey the pattern 2:4"):
        run(source, tmp_path / "wrong", pattern="2:4")


def test_quantized_and_damaged_sources_are_refused(make, tmp_path):
    groups = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}, "format": "float-quantized"}
    source, _, _ = make("sparse-24-bitmask", **groups)
    with pytest.raises(UserError, match=r"is sparse \(sparse-24-bitmask\) and quantized \(float-quantized\)"):
        run(source, tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"

    def damage(part, change):
        source, _, _ = make("sparse-bitmask")
        tensors = load_file(source / "model.safetensors")
        tensors = change(tensors, f"{name}.{part}")
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        return source

    def flip(tensors, key):
        tensors[key][0, 0] ^= 1
        return tensors

    def pad(tensors, key):
        tensors[key][0, -1] |= 128
        return tensors

    def shift(tensors, key):
        tensors[key] += 1
        return tensors

    def drop(tensors, key):
        return {k: v for k, v in tensors.items() if k != key}

    for part, change, words in (
        ("bitmask", flip, f"{name}: the bitmask marks"),
        ("bitmask", pad, f"{name}.bitmask: padding bits are not zero"),
        ("row_offsets", shift, f"{name}.row_offsets contradicts the bitmask"),
        ("bitmask", drop, f"tensor {name}.bitmask is missing beside {name}.compressed"),
    ):
        with pytest.raises(FormatError, match=words):
            run(damage(part, change), tmp_path / "out", pattern="unstructured")
    assert list(tmp_path.iterdir()) == []
