"""`convert --reconstruct`: the same masks, outputs closer to the dense model's, never worse."""

import pytest
import torch

import helpers
from sparse_rt import assets
from sparse_rt.checkpoint import Checkpoint, file_digest, read_json
from sparse_rt.config import ConvertOptions, EvalOptions
from sparse_rt.errors import UserError
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.eval import eval as evaluate


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(assets.calibration_text().read_text()[:40_000])
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return helpers.tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def run(text, tmp_path):
    def convert_to(name, model, **options):
        fields = dict(model=str(model), output_dir=tmp_path / name, dataset=str(text), num_samples=4, max_seq_len=24)
        return convert(ConvertOptions.build(**{**fields, **options}))

    return convert_to


def weights(folder):
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.load_weight(name) for name in checkpoint.weights}


def test_the_shipped_model_gets_better(run, tmp_path):
    options = dict(method="wanda", num_samples=64, max_seq_len=128)
    run("pruned", assets.model_dir(), **options)
    result = run("trained", assets.model_dir(), reconstruct=48, **options)
    assert len(result["block_error"]) == 5
    assert all(0 < error["after"] < error["before"] < 1 for error in result["block_error"].values())
    assert result["mean_block_error_after"] < 0.85 * result["mean_block_error_before"]
    manifest = read_json(tmp_path / "trained" / "sparse_rt.manifest.json")
    assert manifest["block_error"] == result["block_error"] and manifest["options"]["reconstruct"] == 48
    assert "48 steps a block" in (tmp_path / "trained" / "README.md").read_text()
    pruned, trained = weights(tmp_path / "pruned"), weights(tmp_path / "trained")
    for name, (values, metadata) in pruned.items():
        assert trained[name][0].dtype == values.dtype and not torch.equal(trained[name][0], values)
        if name.startswith("model.layers.0."):  # the inputs of later blocks, and with them Wanda's masks, differ
            assert torch.equal(metadata, trained[name][1])
    scores = {
        name: evaluate(EvalOptions.build(model=str(tmp_path / name), max_seq_len=128, max_samples=24))["perplexity"]
        for name in ("pruned", "trained")
    }
    assert scores["trained"] < 0.97 * scores["pruned"]


@pytest.mark.parametrize("pattern, sparsity", [("2:4", 0.5), ("unstructured", 0.7)])
def test_masks_of_magnitude_stay_as_they_are(run, tiny, tmp_path, pattern, sparsity):
    """Magnitude needs no calibration, so its masks do not depend on what was trained before."""
    options = dict(method="magnitude", pattern=pattern, sparsity=sparsity)
    run("pruned", tiny, **options)
    result = run("trained", tiny, reconstruct=10, **options)
    pruned, trained = weights(tmp_path / "pruned"), weights(tmp_path / "trained")
    assert all(torch.equal(metadata, trained[name][1]) for name, (_, metadata) in pruned.items())
    assert result["mean_block_error_after"] < result["mean_block_error_before"]


def test_a_block_that_comes_no_closer_stays_as_pruned(run, tiny, tmp_path):
    run("pruned", tiny, method="wanda")
    for rate in (50, 1e38):  # far off, and not finite
        result = run("trained", tiny, method="wanda", reconstruct=2, reconstruct_learning_rate=rate, overwrite=True)
        assert all(error["after"] == error["before"] for error in result["block_error"].values())
        assert "2 of 2 blocks stayed as pruned" in result["notes"][-1]
        files = [next((tmp_path / name).glob("*.safetensors")) for name in ("pruned", "trained")]
        assert file_digest(files[0]) == file_digest(files[1])


def test_weights_outside_of_the_blocks_are_pruned_only(run, tiny, tmp_path):
    result = run("out", tiny, method="magnitude", ignore=[], reconstruct=2)
    assert "lm_head" in Checkpoint.open(tmp_path / "out").weights
    assert set(result["block_error"]) == {"model.layers.0", "model.layers.1"}


def test_dry_run_counts_the_memory_of_training(run, tiny, tmp_path):
    memory = run("out", tiny, method="magnitude", reconstruct=5, dry_run=True)["estimated_peak_memory_bytes"]
    kept = (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160) // 2
    ends = 2 * (64 + 64) + 2 * (32 + 64) + 3 * (64 + 160)
    stored = 2 * kept + 2 * kept // 8  # values and a bit a weight, until the block is written
    assert memory["reconstruction"] == memory["activations"] + 16 * kept + 8 * 24 * ends + stored
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_reconstructed_is_refused(run, tiny, tmp_path):
    for options, words in (
        ({"method": "none"}, "with --method none there is no dense one"),
        ({"reconstruct": -1}, "greater than or equal to 0"),
        ({"reconstruct_learning_rate": 0}, "greater than 0"),
    ):
        with pytest.raises(UserError, match=words):
            run("out", tiny, **{"method": "magnitude", "reconstruct": 4, **options})
    assert list(tmp_path.iterdir()) == []
