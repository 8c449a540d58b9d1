"""A small compressed model in float32, rows to train on, and launches of several processes."""

import json
import sys
from pathlib import Path

import pytest
import torch

import helpers
from sparse_rt.config import FinetuneOptions


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    dense = helpers.tiny_llama(folder / "dense", dtype=torch.float32)
    return helpers.compress_folder(dense, folder / "base", "unstructured")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 3) for i in range(40)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture
def options(base, rows, tmp_path):
    """Make the options of a short run into a folder of this test."""
    return lambda output="out", trainer=(), adapter="spp", **changes: helpers.short_run(
        base, rows, tmp_path / output, trainer, adapter, **changes
    )


@pytest.fixture
def launch(tmp_path):
    """Run fine-tunings in two processes; returns what each process saw, by run and rank."""

    def run(runs: dict[str, FinetuneOptions], stop=None, shard_on_cpus=False, processes=2):
        """``stop``: run -> arguments of ``ranks.Stop``. A run that kills its process is the last one."""
        stop = stop or {}
        described = [
            {"name": name, "options": given.model_dump(mode="json"), "stop": stop.get(name, {})}
            for name, given in runs.items()
        ]
        spec = {"out": str(tmp_path), "runs": described, "shard_on_cpus": shard_on_cpus}
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        script = Path(__file__).with_name("ranks.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = helpers.run_processes([*command, str(script), str(tmp_path / "spec.json")])
        if any(how.get("kill") for how in stop.values()):
            assert done.returncode != 0
        elif done.returncode:
            raise AssertionError(done.stderr[-20000:])
        found = {name: [tmp_path / f"{name}.{rank}.pt" for rank in range(processes)] for name in runs}
        return {
            name: [torch.load(path, weights_only=False) for path in paths if path.exists()]
            for name, paths in found.items()
        }

    return run
