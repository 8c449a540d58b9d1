"""What ``sparse-rt convert`` cannot do is refused before any work: exit code 2, one sentence, nothing on the disk."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from legacy_folders import GOLDEN
from sparse_rt.tools.cli import main


@pytest.fixture(scope="module")
def folders(dense_llama, tmp_path_factory):
    """Model folders by what is wrong with them."""
    root = tmp_path_factory.mktemp("models")

    def quantized(name, section):
        folder = shutil.copytree(dense_llama, root / name)
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": section}
        (folder / "config.json").write_text(json.dumps(config))

    shutil.copytree(dense_llama, root / "dense")
    quantized("gptq", {"quant_method": "gptq", "bits": 4})
    for path in (GOLDEN / "quantized").glob("*marlin*.json"):
        quantized("marlin", json.loads(path.read_text()))
    for path in (GOLDEN / "quantized").glob("*fp8*.json"):
        quantized("fp8", json.loads(path.read_text()))
    missing = shutil.copytree(dense_llama, root / "missing", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(dense_llama / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, missing / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (missing / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    empty = shutil.copytree(dense_llama, root / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    assert (empty / "config.json").is_file()
    return root


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            "gptq",
            [],
            "is stored by gptq, sparse-rt reads plain bfloat16, float16 and float32 weights; convert the unqu",
        ),
        ("marlin", ["--method", "none"], "is sparse (2:4) and quantized (marlin-24)"),
        ("fp8", ["--method", "none"], "is sparse (sparse-24-bitmask) and quantized (float-quantized)"),
        ("missing", [], "model.safetensors.index.json names model-00002-of-00002.safetensors, which is not in"),
        ("missing", ["--dry-run"], "names model-00002-of-00002.safetensors, which is not in"),
        ("empty", [], "holds no *.safetensors file"),
        ("dense", ["--pattern", "two:four"], "Unknown pattern 'two:four'; allowed are 2:4, unstructured, N:M"),
        ("dense", ["--pattern", "0:4"], "pattern '0:4': need 0 < N < M"),
        ("dense", ["--pattern", "4:4"], "pattern '4:4': need 0 < N < M"),
        ("dense", ["--overrides", "down_proj=8:8"], "pattern '8:8': need 0 < N < M"),
        ("dense", ["--pattern", "3:7"], "nothing to compress in"),
        ("dense", ["--pattern", "3:7"], "64 columns are not a multiple of 7"),
        ("dense", ["--pattern", "3:7", "--method", "none"], "64 columns are not a multiple of 7"),
        ("dense", ["--pattern", "unstructured", "--sparsity", "1"], "0.5 removes half of the weights"),
        ("dense", ["--pattern", "unstructured", "--sparsity", "nan"], "0.5 removes half of the weights"),
        (
            "dense",
            ["--pattern", "4:8", "--sparsity", "0.7"],
            "sparsity 0.7 contradicts the pattern 4:8, which removes 0.5",
        ),
        ("dense", ["--pattern", "auto"], "--pattern auto finds the pattern of a model that is pruned already"),
        ("dense", ["--method", "none"], "prune it, for example with --method magnitude"),
        ("dense", ["--method", "none", "--pattern", "unstructured"], "prune it, for example with --method magnitude"),
    ],
)
def test_refusals(capsys, folders, tmp_path, model, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(folders / model), "-o", str(tmp_path / "out"), *arguments])
    captured = capsys.readouterr()
    (sentence,) = [line for line in captured.err.splitlines() if not line.startswith("-- ")]
    assert stopped.value.code == 2 and message in sentence and captured.out == ""
    assert list(tmp_path.iterdir()) == []
