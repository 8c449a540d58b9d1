"""Exporting for vLLM and the proof that the export is served as it is; the near-tie rule on its own."""

import pytest
import torch

import helpers
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.errors import CheckFailed, FormatError, UserError
from sparse_rt.exporters.base import EXPORTERS
from sparse_rt.exporters.vllm.agreement import NEAR_TIE_ULPS, compare


def exported(source, output):
    output.mkdir()
    return EXPORTERS.get("vllm")().export(source, output)


def test_the_export_is_a_complete_folder_with_instructions(sparse_llama, tmp_path):
    facts = exported(sparse_llama, tmp_path / "out")
    copy, original = Checkpoint.open(tmp_path / "out"), Checkpoint.open(sparse_llama)
    assert copy.weights.keys() == original.weights.keys() and facts["weights"] == len(original.weights)
    text = (tmp_path / "out" / "README.vllm.md").read_text()
    assert "sparse-rt serve" in text and original.quantization.pattern in text


def test_weights_are_shared_and_the_rest_is_copied(sparse_llama, tmp_path):
    facts = exported(sparse_llama, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert file.samefile(sparse_llama / file.name) and facts["hard_links"] == 1
    assert not (tmp_path / "out" / "config.json").samefile(sparse_llama / "config.json")


def test_options_and_damaged_folders_are_refused(sparse_llama, dense_llama, tmp_path):
    exporter = EXPORTERS.get("vllm")()
    with pytest.raises(UserError, match="no options; got level"):
        exporter.export(sparse_llama, tmp_path, level=3)
    with pytest.raises(FormatError, match="quant_method"):
        exporter.export(dense_llama, tmp_path)
    assert not any(tmp_path.iterdir())


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_equal_tokens_are_counted():
    report = compare([{"tokens": [1, 2], "logits": logits([0, 9, 0], [0, 0, 9])}], [[1, 2]], torch.bfloat16)
    assert report == {"compared": 2, "equal": 2, "near_ties": [], "differences": []}


def test_a_difference_counts_as_a_tie_only_within_a_few_units_in_the_last_place():
    unit = 8 * torch.finfo(torch.bfloat16).eps  # at a best logit of 8
    for gap, kind in ((NEAR_TIE_ULPS * unit, "near_ties"), (NEAR_TIE_ULPS * unit * 1.01, "differences")):
        reference = [{"tokens": [1, 1], "logits": logits([0, 8, 8 - gap], [0, 9, 0])}]
        report = compare(reference, [[2, 0]], torch.bfloat16)
        assert len(report[kind]) == 1 and report["compared"] == 1 and report["equal"] == 0
        assert report[kind][0]["found"] == 2
    reference = [{"tokens": [1], "logits": logits([0, 8, 8 - unit])}]
    assert compare(reference, [[2]], torch.float32)["differences"]  # the same gap is none in float32


def test_stopping_early_is_a_difference():
    reference = [{"tokens": [1, 1], "logits": logits([0, 8, 0], [0, 8, 0])}]
    assert compare(reference, [[1]], torch.bfloat16)["differences"][0]["step"] == 1


@pytest.mark.slow
def test_check_compares_with_transformers_and_notices_another_model(tmp_path_factory):
    pytest.importorskip("vllm")
    root = tmp_path_factory.mktemp("check")
    made = []
    for seed in (0, 1):
        sizes = dict(hidden_size=128, head_dim=32, initializer_range=0.1)
        dense = helpers.tiny_model(root / f"dense-{seed}", seed=seed, dtype=torch.float32, **sizes)
        made.append(helpers.compress_folder(dense, root / f"sparse-{seed}", "2:4"))
    exporter = EXPORTERS.get("vllm")()
    facts = exporter.check(made[0], made[0])
    assert facts["equal"] == facts["compared"] == 3 * 24 and facts["engine"].startswith("vllm ")
    with pytest.raises(CheckFailed, match="disagree on prompt 0") as failure:
        exporter.check(made[0], made[1])
    assert failure.value.result["differences"]
