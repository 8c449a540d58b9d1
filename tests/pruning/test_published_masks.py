"""The masks are those of the scripts published with the papers, which were run once on the same inputs."""

import base64
import json
from pathlib import Path

import pytest
import torch

from golden_inputs import inputs_of
from sparse_rt.formats import get_format
from sparse_rt.formats.packing import unpack_bits
from sparse_rt.pruning import ActivationStats, get_pruner

CASES = json.loads((Path(__file__).parent.parent / "data" / "published_masks.json").read_text())["masks"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['method']}-{case['pattern']}")
def test_masks_are_those_of_the_published_code(case):
    weight, x = inputs_of(case["seed"], *case["shape"])
    stats = ActivationStats(x.shape[-1], gram=True, moments=True)
    for sequence in x:
        stats.add(sequence)
    packed = torch.frombuffer(bytearray(base64.b64decode(case["mask"])), dtype=torch.uint8)
    expected = unpack_bits(packed.view(len(weight), -1), x.shape[-1])
    _, mask = get_pruner(case["method"]).prune(weight, stats, get_format(case["pattern"]), case["sparsity"])
    assert torch.equal(mask, expected)
