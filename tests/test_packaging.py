"""The wheel and the sdist hold everything, and an installed copy runs without the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Wheel and sdist built from a copy of what a release holds (no build leftovers, no caches)."""
    copy = tmp_path_factory.mktemp("source") / "sparse-rt"
    skip = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", "demo", "tests"
    )
    shutil.copytree(ROOT, copy, ignore=skip)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), cwd=copy)
    return copy / "dist"


def test_wheel_holds_code_sources_and_assets(dist):
    names = zipfile.ZipFile(next(dist.glob("*.whl"))).namelist()
    for wanted in (
        "sparse_rt/__init__.py",
        "sparse_rt/py.typed",
        "sparse_rt/kernels/ops.py",
        "sparse_rt/kernels/native/build.py",
        "sparse_rt/exporters/vllm/plugin.py",
        "sparse_rt/tools/cli.py",
        "sparse_rt/assets/heldout.txt",
        "sparse_rt/assets/pystdlib-5m/config.json",
        "sparse_rt/assets/pystdlib-5m/model.safetensors",
    ):
        assert wanted in names
    assert any(name.startswith("sparse_rt/kernels/native/csrc/") and name.endswith(".c") for name in names)
    assert not [name for name in names if name.startswith(("kernels/", "tools/", "exporters/", "runtime/", "tests/"))]
    assert (dist / next(dist.glob("*.tar.gz"))).stat().st_size > 1_000_000, "the sdist carries the shipped model"


def test_installed_wheel_runs_outside_the_checkout(dist, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    # -S leaves out this environment's own editable install; its folder still lends the packages that sparse-rt needs.
    here = [path for path in sys.path if path.endswith("site-packages")]
    prefix = f"import sys; sys.path[1:1] = {[str(site), *here]!r}; "

    def python(code):
        return run(sys.executable, "-S", "-c", prefix + code, cwd=tmp_path).stdout

    location = python("import sparse_rt; from sparse_rt.kernels import ops; print(sparse_rt.__file__)")
    assert location.strip().startswith(str(site))
    help_text = python("from sparse_rt.tools.cli import main; main(['--help'])")
    assert "convert" in help_text


def test_entry_points_and_extras():
    import importlib.metadata as metadata

    plugin = [e for e in metadata.entry_points(group="vllm.general_plugins") if e.name == "sparse_rt"]
    assert [entry.value for entry in plugin] == ["sparse_rt.exporters.vllm.plugin:register"]
    extras = set(metadata.metadata("sparse-rt").get_all("Provides-Extra"))
    assert {"train", "vllm", "vllm-cpu", "onnx", "eval", "plot", "dev"} <= extras
    required = [text for text in metadata.requires("sparse-rt") if "extra ==" not in text]
    assert not [text for text in required if text.startswith("vllm")], "vLLM is never a hard dependency"


def test_python_dash_m_and_console_script_are_the_same_command(tmp_path):
    script = run(str(Path(sys.executable).parent / "sparse-rt"), "--version", cwd=tmp_path).stdout
    assert run(sys.executable, "-m", "sparse_rt", "--version", cwd=tmp_path).stdout == script
