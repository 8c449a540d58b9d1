"""Every GPU kernel and shipped launch configuration, compiled for three architectures on a machine without a GPU.

Nothing here proves a result (the interpreter tests do) or a speed (benchmarks/gpu_suite.py does). It proves that the
kernels compile, that none of them spills registers to memory, that the tensor cores are used where they should be, and
that no change made the main loops longer unnoticed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from sparse_rt.kernels.triton import configs

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("compile_all.py")
RECORDED = json.loads(SCRIPT.with_name("compiled.json").read_text())
MAX_REGISTERS = 255
SLACK = 1.05  # more instructions per weight than on record that are tolerated


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What compile_all.py printed, from an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows(report) -> list[dict]:
    """The kernels that compiled; those that did not fail ``test_every_kernel_compiles`` alone."""
    return [row for row in report["rows"] if "error" not in row]


def named(row: dict) -> str:
    return f"{row['name']} sm_{row['architecture']}"


def test_every_kernel_compiles(report):
    failed = [f"{named(row)}: {row['error']}" for row in report["rows"] if "error" in row]
    assert not failed, "\n".join(failed)
    assert {row["architecture"] for row in report["rows"]} == {80, 90, 100}


def test_every_kernel_has_a_spec(report):
    assert report["uncovered_functions"] == []
    assert report["repeated_names"] == []


def test_every_shipped_configuration_is_compiled(report):
    assert report["uncovered_configurations"] == []


def test_no_kernel_spills_or_uses_too_many_registers(rows):
    spilled = [
        f"{named(row)}: {row['stack']} B stack, {row['local']} B local" for row in rows if row["stack"] + row["local"]
    ]
    assert not spilled, "\n".join(spilled)
    assert [named(row) for row in rows if row["reg"] > MAX_REGISTERS] == []


def test_expected_instructions_are_there(rows):
    lacking = [f"{named(row)}: {row['missing']}; has {row['tensor_core']}" for row in rows if row["missing"]]
    assert not lacking, "\n".join(lacking)


def test_instructions_per_weight_have_not_grown(report, rows):
    if report["triton"] != RECORDED["triton"]:
        pytest.skip(f"recorded with Triton {RECORDED['triton']}, this is {report['triton']}")
    grown, unknown = [], []
    for row in rows:
        if "per_weight" not in row:
            continue
        recorded = RECORDED["per_weight"].get(row["name"], {}).get(str(row["architecture"]))
        if recorded is None:
            unknown.append(named(row))
        elif row["per_weight"] > recorded * SLACK:
            grown.append(f"{named(row)}: {row['per_weight']} thread-instructions per weight, recorded {recorded}")
    assert not grown, "\n".join(grown)
    assert not unknown, f"not on record (compile_all.py --record): {unknown}"


@pytest.mark.parametrize("name", configs.files())
def test_shipped_files_answer_every_call(name):
    for kernel, rows in configs.read(name).get("kernels", {}).items():
        assert not set(rows[-1]) & set(configs.LIMITS), f"{name}: the last row of {kernel} must fit every call"
        assert all(row["options"] for row in rows)


def test_an_unknown_gpu_gets_the_default_configuration(monkeypatch):
    default = {kernel: rows[-1]["options"] for kernel, rows in configs.read(configs.DEFAULT)["kernels"].items()}
    monkeypatch.setattr(configs, "gpu_name", lambda device=None: configs.file_name("Some GPU 9000 (80GB)"))
    for kernel, options in default.items():
        assert configs.config(kernel, 1 << 40, 1 << 40, 1 << 40) == options
    assert configs.config("no such kernel", 1, 1, 1, BLOCK=64) == {"BLOCK": 64}


def test_the_first_fitting_row_of_the_gpu_wins(monkeypatch):
    tables = {
        "gpu_x": {"kernels": {"a": [{"tokens": 8, "n": 64, "options": {"B": 1}}, {"options": {"B": 2}}]}},
        "default": {"kernels": {"a": [{"options": {"B": 3}}], "b": [{"options": {"B": 4}}]}},
    }
    monkeypatch.setattr(configs, "read", tables.__getitem__)
    monkeypatch.setattr(configs, "gpu_name", lambda device=None: "gpu_x")
    configs._options.cache_clear()
    try:
        found = [configs.config("a", 1, n, tokens)["B"] for n, tokens in ((64, 8), (65, 8), (64, 9))]
        assert found == [1, 2, 2]
        assert configs.config("b", 1, 1, 1, C=7) == {"B": 4, "C": 7}
    finally:
        configs._options.cache_clear()
