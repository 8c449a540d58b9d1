"""Whatever is done to the JSON of a folder or to its bytes: it opens, or one sentence of ours says what is wrong."""

import copy
import json
import random
import shutil
import struct

import pytest

import helpers
from sparse_rt.checkpoint import INDEX_NAME, MANIFEST_NAME, Checkpoint, is_sparse_checkpoint, read_json
from sparse_rt.checkpoint.header import METADATA_KEY
from sparse_rt.errors import FormatError, SparseRTError
from sparse_rt.exporters.int8 import Int8Exporter
from sparse_rt.workflows.verify import check_manifest

JUNK = (None, 0, -1, 1.5, True, "", "2:4", [], [1, 2], [[1]], {}, {"a": 1}, 10**30)
CASES = 150


@pytest.fixture(scope="module", params=["plain", "int8"])
def folder(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("damage")
    dense = helpers.tiny_llama(root / "dense", num_hidden_layers=1)
    plain = helpers.compress_folder(dense, root / "plain", "2:4")
    if request.param == "int8":
        (root / "int8").mkdir()
        Int8Exporter().export(plain, root / "int8")
    return root / request.param


def places(value, path=()):
    """Paths of everything inside ``value``."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*path, key))


def damage(value, choice):
    """``value`` with one part of it removed or replaced by something else."""
    path = choice.choice(list(places(value)))
    if not path:
        return choice.choice(JUNK)
    value = copy.deepcopy(value)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if choice.random() < 0.3:
        del parent[path[-1]]
    else:
        parent[path[-1]] = choice.choice(JUNK)
    return value


def split(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(file, header, data):
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def damage_json(name):
    return lambda folder, choice: (folder / name).write_text(json.dumps(damage(read_json(folder / name), choice)))


def damage_header(folder, choice):
    (file,) = folder.glob("*.safetensors")
    header, data = split(file)
    join(file, damage(header, choice), data)


def damage_description(folder, choice):
    (file,) = folder.glob("*.safetensors")
    header, data = split(file)
    described = damage(json.loads(header["__metadata__"][METADATA_KEY]), choice)
    header["__metadata__"][METADATA_KEY] = json.dumps(described)
    join(file, header, data)


def damage_bytes(folder, choice):
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    for _ in range(3):
        data[choice.randrange(400)] = choice.randrange(256)
    file.write_bytes(data[: choice.randrange(len(data))] if choice.random() < 0.3 else data)


DAMAGE = {
    "config": damage_json("config.json"),
    "index": damage_json(INDEX_NAME),
    "manifest": damage_json(MANIFEST_NAME),
    "header": damage_header,
    "description": damage_description,
    "bytes": damage_bytes,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_in_one_sentence(kind, folder, tmp_path):
    said = 0
    for seed in range(CASES):
        copied = tmp_path / str(seed)
        shutil.copytree(folder, copied)
        DAMAGE[kind](copied, random.Random(seed))
        try:
            if is_sparse_checkpoint(copied):
                check_manifest(Checkpoint.open(copied), read_json(copied / MANIFEST_NAME))
        except SparseRTError as error:
            said += 1
            assert isinstance(error, FormatError) and error.exit_code == 2
            assert len(str(error)) > 20 and "\n" not in str(error)
        shutil.rmtree(copied)
    assert said > CASES // 10  # some of it is harmless: a key nobody reads
