"""A shard that waited in a file has the bytes that safetensors writes."""

import errno
import json
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_rt.checkpoint import shard as shards
from sparse_rt.checkpoint import tensor_digest
from sparse_rt.checkpoint.header import DTYPES
from sparse_rt.checkpoint.shard import OpenShard
from sparse_rt.errors import SparseRTError

TEXT = {"format": "pt", "a": 'quotes " and ü'}


@pytest.fixture
def shard(tmp_path):
    with ThreadPoolExecutor(max_workers=1) as worker:
        yield OpenShard(worker, tmp_path)


def every_dtype(seed=0):
    """Two tensors a dtype of shapes that leave odd lengths, a scalar, an empty one, and names that need escapes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, dtype in enumerate(DTYPES.values()):
        for shape in ((3, 5), (7,)):
            raw = torch.randint(0, 2, shape, generator=generator)
            tensors[f"{'zyxwvu'[number % 6]}.{number}.{len(shape)}"] = raw.to(dtype)
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4), "über\n": torch.ones(3, dtype=torch.bfloat16)}
    return tensors


def library_bytes(tensors, path):
    """What safetensors writes, with the free text in our order."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=TEXT)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + text.ljust(length) + content[8 + length :]


def test_the_bytes_are_those_of_safetensors(shard, tmp_path):
    tensors = every_dtype()
    for name, tensor in tensors.items():
        shard.add(name, tensor)
    assert len(shard) == len(tensors) and shard.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    digests = shard.write(tmp_path / "ours", TEXT)
    assert (tmp_path / "ours").read_bytes() == library_bytes(tensors, tmp_path / "library")
    assert digests == {name: tensor_digest(tensor) for name, tensor in tensors.items()}


def test_it_is_empty_after_writing_and_fills_again(shard, tmp_path):
    first, second = every_dtype(1), {"later": torch.arange(10).view(2, 5).T}  # not contiguous
    for number, tensors in enumerate((first, second)):
        assert not shard and shard.nbytes == 0
        for name, tensor in tensors.items():
            shard.add(name, tensor)
        shard.write(tmp_path / f"{number}", TEXT)
    loaded = load_file(tmp_path / "1")
    assert loaded.keys() == {"later"} and torch.equal(loaded["later"], second["later"])


def test_tensors_larger_than_the_copying_buffer(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "COPY_BYTES", 1000)
    tensors = {"a": torch.randn(33, 77), "b": torch.randn(250)}  # the second exactly one buffer
    for name, tensor in tensors.items():
        shard.add(name, tensor)
    shard.write(tmp_path / "ours", TEXT)
    assert (tmp_path / "ours").read_bytes() == library_bytes(tensors, tmp_path / "library")


def test_no_tensor_stays_in_memory_and_no_file_in_the_folder(shard, tmp_path):
    gone = []
    for number in range(3):
        tensor = torch.ones(1000)
        weakref.finalize(tensor.untyped_storage(), gone.append, number)
        shard.add(str(number), tensor)
        del tensor
    until = time.monotonic() + 30
    while len(gone) < 3 and time.monotonic() < until:  # the last one may still be on its way
        time.sleep(0.01)
    assert sorted(gone) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["waiting", "writing"])
def test_a_full_disk_is_said_so(shard, tmp_path, monkeypatch, moment):
    def full(file, raw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if moment == "writing":
        shard.add("a", torch.ones(3))
        shard.add("b", torch.ones(3))
    monkeypatch.setattr(shards, "_write_all", full)
    with pytest.raises(SparseRTError, match="No space left on device.*make room"):
        shard.add("c", torch.ones(3))
        shard.write(tmp_path / "out", TEXT)


def test_a_spool_that_was_cut_short_is_no_shard(shard, tmp_path):
    shard.add("a", torch.ones(1000))
    shard.add("b", torch.ones(1000))
    shard.add("c", torch.ones(0))  # waits for the one before
    os.truncate(shard._spool.fileno(), 5000)
    with pytest.raises(SparseRTError, match="shorter than it was"):
        shard.write(tmp_path / "out", TEXT)
