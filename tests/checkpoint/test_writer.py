"""Shards fill up to their limit, output folders appear whole, interrupted work goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from helpers import compressed
from sparse_rt.checkpoint import Checkpoint, CheckpointWriter, SparseConfig, file_digest, output_directory, partial_path
from sparse_rt.errors import UserError


def write_some(writer, count=4, start=0):
    for number in range(start, count):
        values, metadata, _ = compressed(16, 32, "2:4", seed=number)
        name = f"layers.{number}"
        if name not in writer.done:
            writer.add_weight(name, "2:4", 16, 32, values, metadata)
            writer.add(f"{name}.bias", torch.full((16,), float(number)))


def test_shards_stay_under_the_limit_and_describe_themselves(tmp_path):
    with output_directory(tmp_path / "out") as partial:
        writer = CheckpointWriter(partial, {"model_type": "x"}, SparseConfig(pattern="2:4"), max_shard_bytes=2500)
        write_some(writer)
        writer.finish({"source": {"model": "none"}})
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"sparse_rt-0000{k}-of-00002.safetensors" for k in (1, 2)]
    checkpoint = Checkpoint.open(tmp_path / "out")
    for header in checkpoint.headers:
        assert sum(entry.nbytes for entry in header.tensors.values()) <= 2500
        for name in header.sparse()["weights"]:
            assert {f"{name}.weight_values", f"{name}.weight_meta"} <= header.tensors.keys()
    for number in range(4):
        values, metadata, _ = compressed(16, 32, "2:4", seed=number)
        stored = checkpoint.load_weight(f"layers.{number}")
        assert torch.equal(stored[0], values) and torch.equal(stored[1], metadata)


def test_manifest_lists_every_file_with_its_digest(tmp_path):
    with output_directory(tmp_path / "out") as partial:
        (partial / "tokenizer.json").write_text("{}")
        writer = CheckpointWriter(partial, {}, SparseConfig(pattern="2:4"))
        write_some(writer, 1)
        writer.finish({"options": {"method": "none"}})
    manifest = json.loads((tmp_path / "out" / "sparse_rt.manifest.json").read_text())
    assert set(manifest["files"]) == {"config.json", "sparse_rt-00001-of-00001.safetensors", "tokenizer.json"}
    for name, entry in manifest["files"].items():
        path = tmp_path / "out" / name
        assert entry == {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    assert manifest["weights"]["layers.0"] == {"nnz": 256, "pattern": "2:4", "shape": [16, 32], "sparsity": 0.5}
    assert manifest["options"] == {"method": "none"} and manifest["format_version"] == 1


def test_an_error_leaves_nothing_and_a_full_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), output_directory(out) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError("no")
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty.*--overwrite"), output_directory(out):
        pass
    assert (out / "mine").read_text() == "x"
    with output_directory(out, overwrite=True) as partial:
        (partial / "new").write_text("y")
    assert [file.name for file in out.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [out]


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(RuntimeError), output_directory(out, overwrite=True):
        raise RuntimeError("no")
    assert (out / "mine").read_text() == "x"


def test_two_writers_of_one_output_are_refused(tmp_path):
    first, second = output_directory(tmp_path / "out"), output_directory(tmp_path / "out")
    with first, pytest.raises(UserError, match="another process is writing"), second:
        pass


def test_kill_in_the_middle_then_resume_gives_the_same_bytes(tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        sys.path.insert(0, {tests!r})
        sys.path.insert(0, {here!r})
        from test_writer import write_some
        from sparse_rt.checkpoint import CheckpointWriter, SparseConfig, output_directory
        with output_directory({out!r}, keep=True) as partial:
            writer = CheckpointWriter(partial, {{}}, SparseConfig(pattern="2:4"), 1200, fingerprint="f")
            write_some(writer, 3)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    out = tmp_path / "out"
    here = os.path.dirname(__file__)
    script = script.format(tests=os.path.dirname(here), here=here, out=str(out))
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL and not out.exists() and partial_path(out).is_dir()

    with pytest.raises(UserError, match="cannot resume"), output_directory(out, resume=True, keep=True) as partial:
        CheckpointWriter(partial, {}, SparseConfig(pattern="2:4"), 1200, fingerprint="other", resume=True)
    with output_directory(out, resume=True, keep=True) as partial:
        writer = CheckpointWriter(partial, {}, SparseConfig(pattern="2:4"), 1200, fingerprint="f", resume=True)
        assert {"layers.0", "layers.1"} <= writer.done and "layers.2" not in writer.done
        write_some(writer)
        writer.finish()
    with output_directory(tmp_path / "straight") as partial:
        writer = CheckpointWriter(partial, {}, SparseConfig(pattern="2:4"), 1200)
        write_some(writer)
        writer.finish()
    straight = {file.name: file.read_bytes() for file in (tmp_path / "straight").iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == straight
