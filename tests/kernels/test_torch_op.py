"""The product as a kernel of torch's dispatcher: nothing leaks, a prompt of any length fits into a bounded buffer, and
the library can be loaded again."""

import gc
import threading
import weakref

import pytest
import torch

from packed_cases import assert_close, shifted, weight
from sparse_rt.benchmarking.processes import status_bytes
from sparse_rt.errors import BackendError
from sparse_rt.kernels import packed
from sparse_rt.kernels.native import library, torch_op

WORK_BYTES = 64 << 20  # csrc/product.c


def owners(tensor):
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@pytest.mark.parametrize("grad", [True, False])
def test_operands_and_results_are_let_go(grad):
    w = weight("unstructured", 37, 132, 0.75, torch.bfloat16)
    x, bias = torch.randn(6, 132).bfloat16(), torch.randn(37).bfloat16()
    operands = (
        x,
        x.T.contiguous().T,
        shifted(w.pack()),
        w.pack(),
        bias,
        bias.float(),
        torch.stack((bias, bias), 1)[:, 0],
    )
    before = [owners(tensor) for tensor in operands]
    with torch.set_grad_enabled(grad):
        for a in operands[:2]:
            for tensor in operands[2:4]:
                for b in (None, *operands[4:]):
                    y = packed.packed_linear(a, tensor, b, 37, 132)
                    assert owners(y) == owners(torch.empty(1))
                    with pytest.raises(BackendError):
                        packed.packed_linear(a, tensor, b, 36, 132)
                    with pytest.raises(BackendError):
                        packed.packed_linear(a[:, :5], tensor, b, 37, 132)
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None and [owners(tensor) for tensor in operands] == before


def test_a_long_prompt_needs_a_bounded_buffer():
    w = weight("2:4", 5, 516, None, torch.float32)
    tensor, handle = w.pack(), library.load().handle
    tokens = 2 * WORK_BYTES // (516 * 4) + 1000
    per_token = handle.srt_packed_workspace(tensor.data_ptr(), 1)
    assert per_token >= 516 * 4
    assert handle.srt_packed_workspace(tensor.data_ptr(), 100) == 100 * per_token
    assert handle.srt_packed_workspace(tensor.data_ptr(), tokens) <= WORK_BYTES < tokens * per_token
    x = torch.randn(tokens, 516)
    assert_close(packed.packed_linear(x, tensor, None, 5, 516), x.double() @ w.dense.T)


def test_a_thread_takes_its_buffer_with_it():
    w = weight("2:4", 5, 516, None, torch.float32)
    tensor, x = w.pack(), torch.randn(WORK_BYTES // (520 * 4), 516)
    packed.packed_linear(x, tensor, None, 5, 516)
    before = status_bytes("VmRSS")
    for _ in range(8):
        thread = threading.Thread(target=packed.packed_linear, args=(x, tensor, None, 5, 516))
        thread.start()
        thread.join()
    assert status_bytes("VmRSS") - before < 4 * WORK_BYTES


def test_loading_the_library_again_replaces_the_kernel():
    w = weight("2:4", 37, 132, None, torch.bfloat16)
    tensor, x = w.pack(), torch.randn(3, 132).bfloat16()
    expected = packed.packed_linear(x, tensor, None, 37, 132)
    for _ in range(2):
        library.forget()
        library.load()
        assert torch.equal(packed.packed_linear(x, tensor, None, 37, 132), expected)


def test_a_torch_without_the_functions_is_named(monkeypatch):
    monkeypatch.setattr(torch_op, "NAMES", (*torch_op.NAMES, "aoti_torch_of_another_century"))
    with pytest.raises(BackendError, match="lacks what its dispatcher is reached with .*another_century"):
        torch_op.register(library.load().handle)
