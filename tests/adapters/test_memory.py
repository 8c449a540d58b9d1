"""A training step on compressed weights keeps no dense weight: measured on the process, with the kernels' memory."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")

# 24 layers of 1024 x 1024. Dense they are 48 MB in bfloat16 and 96 MB in float32, one alone 2 or 4 MB.
LAYERS, SIZE = 24, 1024
STEP = """
import re, sys
import torch
from torch import nn
from sparse_rt.adapters.registry import get_adapter
from sparse_rt.formats import get_format
from sparse_rt.nn import SparseLinear

adapter, pattern, exact = get_adapter(sys.argv[1]), sys.argv[2], sys.argv[3] == "exact"
torch.set_num_threads(1)
fmt = get_format(pattern)

def layer():
    weight = torch.randn({size}, {size}, dtype=torch.bfloat16)
    values, metadata = fmt.compress(weight, fmt.mask_from_scores(torch.rand({size}, {size}), 0.5))
    base = SparseLinear({size}, {size}, pattern, values, metadata, None)
    return adapter.tuner_layer_cls(base, "default", adapter.config_cls(exact=exact))

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

model = nn.Sequential(*(layer() for _ in range({layers})))
x = torch.randn(16, {size}, dtype=torch.bfloat16, requires_grad=True)
layer()(x).sum().backward()  # libraries are loaded and kernels compiled now
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
model(x).sum().backward()
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize(
    "adapter, exact, pattern",
    [("spp", "fused", "2:4"), ("spp", "exact", "unstructured"), ("masklora", "fused", "unstructured")],
)
def test_a_step_needs_one_layers_scratch(adapter, exact, pattern):
    program = STEP.format(size=SIZE, layers=LAYERS)
    command = [sys.executable, "-c", program, adapter, pattern, exact]
    # Large tensors are mapped and given back one by one. In the heap of malloc what was freed before a step may or may
    # not serve the step: the same step then adds between 0 and 52 MB.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    # Parameters' gradients (2 MB in all), and a few float32 buffers of one layer; all layers' dense weights are 48 MB.
    assert float(done.stdout) < 24, "MB above the state before the step"
