"""The cost benchmark writes complete rows, and its layers train what they say."""

import json

import pytest
import torch
import training_cost
from click.testing import CliRunner


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rows(tmp_path):
    output = tmp_path / "rows.jsonl"
    options = ["--shape", "64x48", "--tokens", "3", "--seconds-per-row", "0", "--blocks", "0", "--output", str(output)]
    done = CliRunner().invoke(training_cost.main, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["cell"] for row in rows] == list(training_cost.CELLS)
    for row in rows:
        assert set(row["ms"]) == {*training_cost.DENSE, *training_cost.SPARSE} and row["commit"]
        assert len(row["ratio"]) == len(training_cost.PAIRS) and row["turns"] == training_cost.MIN_TURNS


@pytest.mark.parametrize("column", [*training_cost.DENSE, *training_cost.SPARSE])
def test_every_trained_tensor_gets_a_gradient(column):
    pattern, tensors = training_cost.tensors_of(column, 64, 48, "2:4")
    layer = training_cost.make(column, 64, 48, pattern, tensors)
    x, dy = torch.randn(5, 48).bfloat16().requires_grad_(), torch.randn(5, 64).bfloat16()
    found = training_cost.gradients(layer, x, dy)
    assert len(found) == 1 + len(layer.trainables) >= 2
    # B of the dense baselines starts at zero, so A has a gradient of zero there.
    assert all(gradient is not None for gradient in found) and any(gradient.any() for gradient in found[1:])


def test_memory_of_a_compressed_stack_is_smaller_than_of_a_dense_one():
    row = training_cost.memory_row("2:4", 8, 40, ("lora", "spp"), ((512, 512),))
    assert row["mb"]["spp"]["built"] < 0.65 * row["mb"]["lora"]["built"]
    assert row["weights"] * 2 / 1e6 == pytest.approx(row["mb"]["lora"]["built"], rel=0.05)
