"""The packing benchmark: a row per layout and operation, and layouts that do not come back are never timed."""

import json

import pack
import pytest
import torch
from click.testing import CliRunner

from sparse_rt.kernels import packed


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*options):
    return CliRunner().invoke(pack.main, ["--shape", "48", "64", "--repeats", "1", "--threads", "1", *options])


def test_every_layout_becomes_two_rows():
    done = run("--sparsity", "0.75", "--layout", "bitmask")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.output.splitlines()]
    cases = ["2:4 0.5 bitmask", "unstructured 0.75 bitmask"]
    expected = [(case, operation) for case in cases for operation in ("pack", "unpack")]
    assert [(row["case"], row["operation"]) for row in rows] == [pack.COPY, *expected]
    for row in rows:
        assert row["ms"] > 0 and row["dense_gb_per_s"] > 0 and row["threads"] == 1 and row["dtype"] == "bfloat16"


def test_a_layout_that_does_not_come_back_is_not_timed(monkeypatch):
    unpack = packed.unpack

    def wrong(*arguments):
        values, metadata = unpack(*arguments)
        return values + 1, metadata

    monkeypatch.setattr(packed, "unpack", wrong)
    done = run()
    assert done.exit_code != 0 and "does not come back" in done.output and "ms" not in done.output
