"""The entry point: cheap, repeatable, silent on tested versions, and harmless to other models when vLLM has changed."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from sparse_rt.exporters.vllm.plugin import register, version_note


def test_vllm_finds_the_plugin_through_its_entry_point():
    (entry,) = entry_points(group="vllm.general_plugins", name="sparse_rt")
    assert entry.load() is register


def test_loading_the_entry_point_imports_neither_vllm_nor_torch():
    code = (
        "import sys, sparse_rt.exporters.vllm.plugin; print([m for m in ('vllm', 'torch', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_exporter_does_not_import_the_engine():
    code = "import sys, sparse_rt.exporters.vllm.exporter; print([m for m in ('vllm', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registering_twice_is_harmless():
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    first = get_quantization_config("sparse_rt")
    register()
    assert get_quantization_config("sparse_rt") is first and first.__name__ == "SparseRTConfig"


def test_a_vllm_that_does_not_fit_is_logged_and_stops_nothing(tmp_path):
    """Another vLLM without the modules that the plugin needs: its own models must still be served."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '9.1.0'\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from sparse_rt.exporters.vllm.plugin import register
register()
print("SERVED")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SERVED"
    assert "this is 9.1.0" in done.stderr and "could not register with vLLM" in done.stderr


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu"])
def test_tested_versions_need_no_words(version):
    assert version_note(version) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0", "dev"])
def test_other_versions_are_named_with_the_tested_range(version):
    note = version_note(version)
    assert version in note and "0.32" in note and "0.33" in note
