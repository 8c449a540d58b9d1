"""What every exporter promises, whoever wrote it, and how the workflow treats their failures."""

import subprocess
import sys

import pytest

import helpers
from sparse_rt.config import ExportOptions
from sparse_rt.errors import CheckFailed, SparseRTError, UserError
from sparse_rt.exporters.base import EXPORTERS, Exporter
from sparse_rt.progress import Progress
from sparse_rt.workflows.export import export

NAMES = ("compressed-tensors", "dense", "int8", "onnx", "vllm")


@pytest.fixture(scope="module")
def source(dense_llama, tmp_path_factory):
    return helpers.compress_folder(dense_llama, tmp_path_factory.mktemp("contract") / "sparse", "2:4")


def run(source, output, **options):
    return export(ExportOptions.build(model=str(source), output_dir=output, **options))


def test_all_exporters_are_registered():
    assert set(NAMES) <= set(EXPORTERS.names())
    for name in NAMES:
        cls = EXPORTERS.get(name)
        assert issubclass(cls, Exporter) and cls.name == name


def test_importing_all_exporters_imports_no_engine():
    code = """
import sys
from sparse_rt.exporters.base import EXPORTERS
EXPORTERS.names()
print([name for name in ("onnx", "onnxruntime", "onnxscript", "vllm", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_unknown_exporter_is_refused_with_the_known_ones(source, tmp_path):
    known = "compressed-tensors, dense, int8, onnx, vllm"
    with pytest.raises(UserError, match=f"Unknown exporter 'gguf'; known are {known}"):
        run(source, tmp_path / "out", to="gguf")


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_model_is_refused_with_the_remedy(name, dense_llama, tmp_path):
    with pytest.raises(UserError, match="sparse-rt convert"):
        run(dense_llama, tmp_path / "out", to=name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused_and_nothing_is_left(name, source, tmp_path):
    with pytest.raises(UserError, match="no_such_option"):
        run(source, tmp_path / "out", to=name, options={"no_such_option": 1})
    assert not list(tmp_path.iterdir())


def test_an_export_over_its_own_source_is_refused(source):
    before = sorted(file.name for file in source.iterdir())
    with pytest.raises(UserError, match="holds the source model"):
        run(source, source, to="dense", overwrite=True)
    assert sorted(file.name for file in source.iterdir()) == before


@pytest.mark.parametrize("name", ["dense", "int8", "compressed-tensors", "vllm"])
def test_exports_never_touch_the_source_or_an_occupied_folder(name, source, tmp_path):
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    result = run(source, tmp_path / "out", to=name)
    assert result["exporter"] == name and result["check"] is None
    assert result["bytes"] == sum(result["files"].values()) > 0
    assert set(result["files"]) == {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json"} <= set(result["files"])
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    with pytest.raises(UserError, match="not empty"):
        run(source, tmp_path / "out", to=name)
    assert run(source, tmp_path / "out", to=name, overwrite=True)["bytes"] == result["bytes"]


class Broken(Exporter):
    """Breaks on demand; a real exporter in every other respect."""

    name = "test-broken"

    def export(self, source, output, crash=False):
        (output / "artefact.safetensors").write_bytes(b"half" if crash else b"whole")
        if crash:
            raise SparseRTError("the disk is full")
        return {}

    def check(self, source, output):
        raise CheckFailed("token 3 differs")


@pytest.fixture
def broken():
    EXPORTERS.register(Broken.name, Broken)
    yield Broken.name
    EXPORTERS._members.pop(Broken.name)


def test_a_crash_leaves_nothing(broken, source, tmp_path):
    with pytest.raises(SparseRTError, match="disk is full"):
        run(source, tmp_path / "out", to=broken, options={"crash": True})
    assert not list(tmp_path.iterdir())


def test_a_failed_check_keeps_the_artefact_and_says_so(broken, source, tmp_path):
    with pytest.raises(CheckFailed, match=r"token 3 differs; the export stays in .*out, do not serve it") as caught:
        run(source, tmp_path / "out", to=broken, check=True)
    assert caught.value.exit_code == 3
    assert (tmp_path / "out" / "artefact.safetensors").read_bytes() == b"whole"


def test_progress_names_the_stages(source, tmp_path):
    class Recorder(Progress):
        stages = []

        def stage(self, text):
            self.stages.append(text)

    options = ExportOptions.build(model=str(source), output_dir=tmp_path / "out", to="compressed-tensors", check=True)
    result = export(options, Recorder())
    assert Recorder.stages == ["export to compressed-tensors", "check in compressed-tensors"]
    assert result["seconds"]["export"] > 0 and result["seconds"]["check"] > 0
    assert 0.9 < result["compression"] < 1.2
