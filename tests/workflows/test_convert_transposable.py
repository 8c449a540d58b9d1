"""`convert --transposable`: what is stored is plain N:M, and its transpose obeys the pattern too."""

import json

import pytest

import helpers
from sparse_rt import assets
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import ConvertOptions, VerifyOptions
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load
from sparse_rt.nn import sparse_linears
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.verify import verify


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transposable")
    helpers.tiny_llama(folder / "model")
    helpers.tiny_llama(folder / "odd", intermediate_size=164)  # a multiple of 4, not of 8
    (folder / "text.txt").write_text(assets.calibration_text().read_text()[:6000])
    return folder


@pytest.fixture
def run(setting, tmp_path):
    def converted(name, model="model", **more):
        fields = dict(dataset=str(setting / "text.txt"), num_samples=3, max_seq_len=24, transposable=True)
        options = dict(model=str(setting / model), output_dir=tmp_path / name, **{**fields, **more})
        return convert(ConvertOptions.build(**options))

    return converted


@pytest.mark.parametrize(
    "pattern, method", [("2:4", "sparsegpt"), ("2:4", "alps"), ("4:8", "wanda+admm"), ("16:32", "magnitude")]
)
def test_the_transpose_of_every_weight_obeys_the_pattern(run, tmp_path, pattern, method):
    result = run("out", pattern=pattern, method=method)
    assert len(result["sparsity"]) == 14 and result["mean_sparsity"] == 0.5
    for name, module in sparse_linears(load(tmp_path / "out")):
        assert module.pattern == pattern
        assert module.format.mask_of(module.decompress().T.contiguous()).sum() == module.nnz, name
    manifest = json.loads((tmp_path / "out" / "sparse_rt.manifest.json").read_text())
    assert manifest["options"]["transposable"] is True
    assert "| masks | transposable" in (tmp_path / "out" / "README.md").read_text()
    assert verify(VerifyOptions.build(model=str(tmp_path / "out")))["ok"]


def test_it_goes_with_ratios_and_with_overrides(run, tmp_path):
    run("out", pattern="4:8", method="wanda", ratios="owl", overrides={"up_proj": "unstructured", "o_proj": "1:2"})
    for name, entry in Checkpoint.open(tmp_path / "out").weights.items():
        assert (entry.pattern == "unstructured") == ("up_proj" in name) and (entry.pattern == "1:2") == (
            "o_proj" in name
        )
    for name, module in sparse_linears(load(tmp_path / "out")):
        if "up_proj" not in name:
            module.format.mask_of(module.decompress().T.contiguous())


def test_rows_that_do_not_divide_stay_dense_with_the_reason(run):
    reasons = {entry["name"]: entry["reason"] for entry in run("out", "odd", pattern="4:8")["skipped"]}
    assert reasons["model.layers.0.mlp.up_proj"] == "164 rows are not a multiple of 8, as a transposable mask needs"
    assert reasons["model.layers.0.mlp.down_proj"] == "164 columns are not a multiple of 8"


def test_what_cannot_be_transposable_is_refused(run, tmp_path):
    for more, words in (
        ({"pattern": "unstructured"}, "needs groups in rows and columns, and the pattern unstructured has none"),
        ({"method": "none"}, "--method none takes the one that is there; leave it out"),
        ({"method": "wanda+dsnot"}, r"wanda\+dsnot chooses single positions within their row"),
    ):
        with pytest.raises(UserError, match=words):
            run("out", **more)
    assert list(tmp_path.iterdir()) == []
