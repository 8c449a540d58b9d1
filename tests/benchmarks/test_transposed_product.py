"""The benchmark of dX through W^T times products that agree, and none that does not."""

import json

import pytest
import torch
import transposed_product
from click.testing import CliRunner

from sparse_rt.kernels import packed

pytestmark = pytest.mark.skipif(
    packed.refusal("2:4", 64, 48, torch.bfloat16, "cpu", 0.5) is not None, reason="no packed product on this processor"
)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*more):
    options = ["--shape", "48", "64", "--tokens", "3", "--seconds", "0", *more]
    return CliRunner().invoke(transposed_product.main, options)


def test_a_row_for_every_pattern_with_all_its_times():
    done = run()
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.output.splitlines()]
    assert [(row["pattern"], row["tokens"], row["threads"]) for row in rows] == [("2:4", 3, 1), ("4:8", 3, 1)]
    for row in rows:
        assert set(row["ms"]) == {"dense", "expanded", "transposed", "packing"} and row["turns"] >= 5
        assert all(times["median"] > 0 for times in row["ms"].values())
        assert row["dense/transposed"]["median"] > 0 and row["expanded/transposed"]["median"] > 0


def test_a_product_that_is_wrong_is_not_timed(monkeypatch):
    product = packed.packed_linear
    monkeypatch.setattr(packed, "packed_linear", lambda *arguments: product(*arguments) + 1)
    done = run("--pattern", "2:4")
    assert done.exit_code != 0 and "transposed gives another product" in done.output and "ms" not in done.output
