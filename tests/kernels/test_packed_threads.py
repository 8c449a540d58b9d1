"""Products with packed weights give the same bits on however many threads and beside whatever else they run."""

import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from packed_cases import layouts, weight
from sparse_rt.kernels import packed
from sparse_rt.kernels.native.packed import DTYPES

CASES = (("2:4", None), ("unstructured", 0.5), ("unstructured", 0.9))


def tensors(dtype):
    for pattern, sparsity in CASES:
        w = weight(pattern, 200, 516, sparsity, dtype)
        for layout in layouts(pattern, dtype):
            yield w, layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(isa, threads, dtype):
    for w, layout in tensors(dtype):
        x, found = torch.randn(300, 516).to(dtype), []
        for count in (1, 2, 3, 2, 1):
            threads(count)
            tensor = w.pack(layout)
            values, metadata = packed.unpack(tensor, *w.shape)
            assert torch.equal(values, w.values) and torch.equal(metadata, w.metadata), (layout, count)
            found.append([packed.packed_linear(x[:t], tensor, None, *w.shape[1:]) for t in (1, 4, 17, 64, 300)])
        for other in found[1:]:
            assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True)), layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_threads_of_python_share_a_weight(isa, threads, dtype):
    threads(2)
    for w, layout in tensors(dtype):
        tensor, wrong = w.pack(layout), []
        xs = [torch.randn(tokens, 516).to(dtype) for tokens in (1, 40)]
        expected = [packed.packed_linear(x, tensor, None, *w.shape[1:]) for x in xs]

        def repeat(index, tensor=tensor, w=w, xs=xs, expected=expected, wrong=wrong):
            for _ in range(10):
                if not torch.equal(packed.packed_linear(xs[index], tensor, None, *w.shape[1:]), expected[index]):
                    wrong.append(index)

        workers = [threading.Thread(target=repeat, args=(index,)) for index in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong, layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_its_batch(isa, dtype):
    """True of every layout but one: `bitmask` of bfloat16 adds up in another order for 1 and for 2 tokens."""
    for pattern, sparsity in CASES:
        w = weight(pattern, 400, 516, sparsity, dtype)
        x = torch.randn(130, 516).to(dtype)
        for layout in layouts(pattern, dtype):
            tensor = w.pack(layout)
            together = packed.packed_linear(x, tensor, None, *w.shape[1:])
            first = 3 if (isa, layout, dtype) == ("avx512_bf16", "bitmask", torch.bfloat16) else 1
            for tokens in (1, 2, 3, 4, 5, 7, 12, 13, 24, 25, 64, 100):
                alone = packed.packed_linear(x[:tokens], tensor, None, *w.shape[1:])
                if tokens >= first:
                    assert torch.equal(alone, together[:tokens]), (layout, pattern, tokens)


def test_a_forked_child_multiplies():
    """On two threads before the fork, on one in the child, which OpenMP does not let start a team."""
    code = """
    import json, os, signal, torch
    from sparse_rt.kernels import packed
    torch.set_num_threads(2)
    torch.manual_seed(0)
    m, n, report = 256, 512, {}
    for dtype in (torch.bfloat16, torch.float32):
        for share in (0.5, 0.9):
            mask = torch.rand(m, n) > share
            bits = mask.view(m, n // 8, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
            weight = torch.randn(int(mask.sum())).to(dtype), bits.sum(-1).to(torch.uint8), "unstructured", m, n
            tensor, x = packed.pack(*weight), torch.randn(40, n).to(dtype)

            def product(weight=weight, tensor=tensor, x=x):
                again = packed.pack(*weight)  # in the child too
                ys = [packed.packed_linear(x[:t], w, None, *weight[3:]) for w in (tensor, again) for t in (1, 40)]
                return b"".join(y.view(torch.uint8).numpy().tobytes() for y in ys)

            expected, name = product(), f"{packed.describe(tensor)['layout']} {dtype}"
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                os._exit(0 if product() == expected else 1)
            report[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(report))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ.copy(),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report) >= 2 and set(report.values()) == {0}, report
