"""What a call of a linear layer costs in a model, where the caches are full of the weight before it.

    python benchmarks/call_cost.py

The weight is 64 x 64, so nearly all of a call is what surrounds the product. Between two calls 24 MB are written, and
the calls come in random order. One JSON row per kind of call: the median in microseconds, one token, bf16.
"""

import json
import random
import statistics
import time

import torch
import torch.nn.functional as F

from sparse_rt.benchmarking.machine import commit, cpu_name
from sparse_rt.kernels import packed
from sparse_rt.nn import SparseLinear

SIZE, ROUNDS, WRITTEN_BYTES = 64, 300, 24 << 20


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    dense = torch.nn.Linear(SIZE, SIZE, bias=False).bfloat16().eval()
    dense.weight.mul_(torch.rand(SIZE, SIZE) > 0.5)
    sparse = SparseLinear.from_dense(dense, "unstructured").eval()
    x, other = torch.randn(1, SIZE).bfloat16(), torch.zeros(WRITTEN_BYTES, dtype=torch.uint8)
    weight = packed.pack(sparse.values, sparse.metadata, "unstructured", SIZE, SIZE)
    calls = {
        "F.linear": lambda: F.linear(x, dense.weight),
        "packed_linear": lambda: packed.packed_linear(x, weight, None, SIZE, SIZE),
        "nn.Linear": lambda: dense(x),
        "SparseLinear": lambda: sparse(x),
    }
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name in random.sample(list(calls), len(calls)):
            other.add_(1)
            start = time.perf_counter_ns()
            calls[name]()
            times[name].append((time.perf_counter_ns() - start) / 1000)
    shared = {
        "threads": torch.get_num_threads(),
        "processor": cpu_name(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    for name, found in times.items():
        print(json.dumps({"call": name, "us": round(statistics.median(found), 1), **shared}))


if __name__ == "__main__":
    main()
