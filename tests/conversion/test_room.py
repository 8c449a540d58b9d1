"""A disk without room for the result is refused before the work."""

import shutil
from types import SimpleNamespace

import pytest

import helpers
from sparse_rt.checkpoint import Checkpoint, partial_path
from sparse_rt.checkpoint.writer import JOURNAL_NAME
from sparse_rt.config import ConvertOptions
from sparse_rt.conversion import room
from sparse_rt.errors import UserError
from sparse_rt.workflows.convert import convert


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return helpers.tiny_llama(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that every disk has left."""

    def set_free(count):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=count, total=10**15))

    return set_free


def options(model, output, **more):
    return ConvertOptions.build(**{"model": str(model), "output_dir": output, "method": "magnitude", **more})


def stored_bytes(folder):
    return Checkpoint.open(folder).total_bytes


@pytest.mark.parametrize("shard", ["20kB", "5GB"])
def test_room_for_the_result_and_one_shard_is_needed(model, free, tmp_path, shard):
    chosen = options(model, tmp_path / "new" / "out", max_shard_size=shard)
    needed = convert(chosen.model_copy(update={"dry_run": True}))["needed_disk_bytes"]
    free(needed - 1)
    with pytest.raises(UserError, match=r"needs .*B on the disk of .*out, .* are free there: make room.*--max-shard"):
        convert(chosen)
    assert not list(tmp_path.iterdir())
    free(needed)
    convert(chosen)
    checkpoint = Checkpoint.open(tmp_path / "new" / "out")
    largest = max(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert largest > 20_000
    assert needed == checkpoint.total_bytes + (largest if shard == "20kB" else checkpoint.total_bytes)


def test_file_systems_that_say_nothing_refuse_nothing(model, monkeypatch, tmp_path):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0, total=0))
    convert(options(model, tmp_path / "out"))


def test_zeros_that_are_not_counted_yet_refuse_nothing(model, free, tmp_path):
    """The model is 60 % zeros, of which its headers say nothing."""
    sparse = helpers.compress_folder(model, tmp_path / "sparse", "unstructured", 0.6)
    from sparse_rt.exporters.dense import DenseExporter

    (tmp_path / "zeros").mkdir()
    DenseExporter().export(sparse, tmp_path / "zeros")
    chosen = options(tmp_path / "zeros", tmp_path / "out", method="none", pattern="unstructured", max_shard_size="20kB")
    free(2 * stored_bytes(sparse))
    convert(chosen)
    assert stored_bytes(tmp_path / "out") == stored_bytes(sparse)


def test_what_an_unfinished_conversion_left_counts_as_room(model, free, tmp_path):
    chosen = options(model, tmp_path / "out", max_shard_size="20kB")
    convert(chosen)
    needed = convert(chosen.model_copy(update={"dry_run": True, "overwrite": True}))["needed_disk_bytes"]
    shard = next((tmp_path / "out").glob("*.safetensors"))
    partial = partial_path(tmp_path / "other")
    partial.mkdir()
    shutil.copy(shard, partial)
    (partial / JOURNAL_NAME).write_text("{}")
    other = chosen.model_copy(update={"output_dir": tmp_path / "other"})
    free(needed - shard.stat().st_size - 3)
    with pytest.raises(UserError, match="are free there"):
        convert(other.model_copy(update={"overwrite": True}))
    free(needed - shard.stat().st_size - 2)
    convert(other.model_copy(update={"overwrite": True}))
    assert stored_bytes(tmp_path / "other") == stored_bytes(tmp_path / "out")
