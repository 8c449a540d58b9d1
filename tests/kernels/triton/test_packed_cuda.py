"""Packed weights of a GPU: both layouts behind one header, products that never read it from the device.

Here ``kernels.triton.packed`` is called directly, in the interpreter; the operators and layers need a GPU.
"""

import functools

import pytest
import torch
from torch import nn

import packed_cases
from sparse_rt.errors import BackendError, FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels import packed as front
from sparse_rt.kernels.backends import Call, explain
from sparse_rt.nn import SparseLinear, pack_weights

pytest.importorskip("triton")
from sparse_rt.kernels.triton import fragments, layouts, mma_sp, packed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = (
    ("2:4", 33, 132, None),
    ("4:8", 17, 64, None),
    ("unstructured", 33, 130, 0.9),
    ("unstructured", 1, 1, 0.0),
)


def canonical(device, case, dtype):
    w = packed_cases.weight(*case, dtype)
    return w.values.to(device), w.metadata.to(device), *w.shape


def make(device, case, dtype, layout=None):
    """(packed, dense, m, n)."""
    w = packed_cases.weight(*case, dtype)
    return packed.pack(*canonical(device, case, dtype), layout), w.dense.to(device), w.m, w.n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_packed_comes_back(device, case, dtype):
    values, metadata, pattern, m, n = canonical(device, case, dtype)
    layout = "mma_sp" if pattern == "2:4" and dtype != torch.float32 else "d4"
    assert packed.choose_layout(pattern, dtype, 0.5)[0] == layout
    for chosen in {layout, "d4"}:
        tensor = packed.pack(values, metadata, pattern, m, n, None if chosen == layout else chosen)
        expected = {"layout": chosen, "dtype": dtype, "m": m, "n": n, "nnz": values.numel(), "nbytes": tensor.nbytes}
        for same in (tensor, tensor.clone()):  # what pack remembers, and what stands in the header
            assert packed.describe(same) == expected
            found = packed.unpack(same, pattern, m, n)
            assert torch.equal(found[0], values) and torch.equal(found[1], metadata)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(device, case, dtype):
    """The limit of the layout, more tokens, and the gradient of x."""
    tensor, dense, m, n = make(device, case, dtype)
    bias = torch.randn(m).to(device, dtype)
    for tokens in (0, 1, 17):
        x, dy = torch.randn(tokens, n).to(device, dtype), torch.randn(2, tokens, m).to(device, dtype)
        y = packed.linear(x, tensor, bias, m, n)
        packed_cases.assert_close(y, x.double() @ dense.T + bias.double(), tokens)
        packed_cases.assert_close(packed.linear_t(dy, tensor, m, n), dy.double() @ dense, tokens)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_size_says_where_everything_is(device, case, monkeypatch):
    """What a capture relies on: no header is read, and nothing is remembered of a copy."""
    tensor, dense, m, n = make(device, case, torch.bfloat16)
    monkeypatch.setattr(packed, "_capturing", lambda tensor: True)
    monkeypatch.setattr(packed, "_header", lambda *_: pytest.fail("the header was read"))
    x = torch.randn(17, n).to(device, torch.bfloat16)
    for same in (tensor, tensor.clone()):
        packed_cases.assert_close(packed.linear(x, same, None, m, n), x.double() @ dense.T)


def test_a_packed_weight_may_begin_anywhere(device):
    tensor, dense, m, n = make(device, CASES[2], torch.bfloat16)
    x = torch.randn(3, n).to(device, torch.bfloat16)
    y = packed.linear(x, packed_cases.shifted(tensor), None, m, n)
    packed_cases.assert_close(y, x.double() @ dense.T)


def test_operands_that_do_not_fit_are_refused(device):
    tensor, _, m, n = make(device, CASES[0], torch.bfloat16)
    x = torch.randn(3, n).to(device, torch.bfloat16)
    bias = torch.zeros(m, device=device).bfloat16()
    with pytest.raises(BackendError, match="x is torch.float32, the packed values are torch.bfloat16"):
        packed.linear(x.float(), tensor, None, m, n)
    with pytest.raises(BackendError, match="the bias is torch.float32, x is torch.bfloat16"):
        packed.linear(x, tensor, bias.float(), m, n)
    for x_, bias_ in ((x[:, 1:], None), (x, bias[1:]), (x[0, 0], None)):
        with pytest.raises(BackendError, match=r"a \(33, 132\) weight takes x \[..., 132\] and a bias \[33\], got x"):
            packed.linear(x_, tensor, bias_, m, n)


@pytest.mark.parametrize("wrong", ["random", "short", "cut off", "words", "another shape", "matrix", "of the CPU"])
def test_a_tensor_that_is_no_packed_weight_is_refused(device, wrong):
    tensor, _, m, n = make(device, CASES[0], torch.bfloat16)
    other = {
        "random": torch.randint(0, 256, (1000,), dtype=torch.uint8).to(device),
        "short": tensor[:100],
        "cut off": tensor[:-64],
        "words": torch.randn(1000).to(device),
        "another shape": make(device, ("2:4", 36, 132, None), torch.bfloat16)[0],
        "matrix": tensor.view(-1, 1),
        "of the CPU": packed_cases.weight(*CASES[0], torch.bfloat16).pack().to(device),
    }[wrong]
    for call in (
        lambda: packed.unpack(other, "2:4", m, n),
        lambda: packed.linear(torch.randn(3, n).to(device, torch.bfloat16), other, None, m, n),
    ):
        with pytest.raises(BackendError, match=r"not a packed \(33, 132\) weight"):
            call()


def test_what_cannot_be_packed_says_why(device):
    values, metadata, *shape = canonical(device, CASES[0], torch.bfloat16)
    bitmask = canonical(device, CASES[2], torch.bfloat16)
    with pytest.raises(UserError, match="unstructured weight of torch.bfloat16 cannot have the layout 'mma_sp'"):
        packed.pack(*bitmask, "mma_sp")
    with pytest.raises(UserError, match="cannot have the layout 'pairs'"):
        packed.pack(values, metadata, *shape, "pairs")
    with pytest.raises(FormatError, match="shape"):
        packed.pack(values[:-1], metadata, *shape)
    with pytest.raises(FormatError, match="uint8, got int32"):
        packed.pack(values, metadata.int(), *shape)
    with pytest.raises(UserError, match="one device"):
        packed.pack(values, metadata.to("meta"), *shape)
    with pytest.raises(BackendError, match="is a packed 2:4 weight, not a unstructured one"):
        packed.unpack(packed.pack(values, metadata, *shape), "unstructured", *shape[1:])
    for call, reason in (
        (Call("packed_linear", "2:4", 0, 4, 1, torch.float32, "cuda"), "the weight is empty"),
        (Call("packed_linear", "2:4", 4, 4, 1, torch.float64, "cuda"), "not float64"),
        (Call("packed_linear", "2:4", 4, 4, 1, torch.float32, "cpu"), "the tensors are on cpu"),
    ):
        assert reason in packed.can_run(call)


def expanded(x, values, metadata, bias, m, n):
    """The product with fragments by way of the canonical tensors."""
    weight = fragments.unpack_fragments(values, metadata, m, n, x.dtype)
    return x @ get_format("2:4").decompress(*weight, m, n).T


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_wrong_product_of_the_tensor_cores_is_noticed(device, dtype):
    def rows_swapped(x, values, *rest):
        return expanded(x, values, *rest).roll(1, -1)

    def late_columns_missing(x, *rest):
        x = x.clone()
        x[:, -4:] = 0
        return expanded(x, *rest)

    def broken(*_):
        raise RuntimeError("no kernel image")

    check = functools.partial(layouts.disagreement, dtype, torch.device(device))
    assert check(expanded) is None
    for wrong in (rows_swapped, late_columns_missing):
        assert "has a relative error of" in check(wrong)
    assert "does not run on this GPU (RuntimeError: no kernel image)" in check(broken)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_the_tensor_cores_are_trusted(dtype):
    assert layouts.disagreement(dtype, torch.device("cuda"), mma_sp.linear) is None


def test_the_operators_have_a_kernel_for_gpus():
    for name in ("packed_linear", "packed_linear_forward", "packed_linear_t"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_rt::{name}", "CUDA")
    names = dict(explain(Call("packed_linear", "2:4", 4, 4, 1, torch.float32, "xpu")).refused)
    assert "the tensors are on xpu" in names["triton"]


# ---- with a GPU -----------------------------------------------------------------------------------------------------


def layer(case, dtype=torch.bfloat16):
    w = packed_cases.weight(*case, dtype)
    made = SparseLinear(w.n, w.m, w.pattern, w.values.clone(), w.metadata.clone(), torch.randn(w.m).to(dtype))
    return made.cuda().eval(), w


def expected(x, made, w):
    return x.double() @ w.dense.T.cuda() + made.bias.double()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_packs_itself_and_unpacks_for_training(case):
    made, w = layer(case)
    x = torch.randn(3, w.n, device="cuda").bfloat16()
    with torch.no_grad():
        packed_cases.assert_close(made(x), expected(x, made, w))
    assert made.is_packed and front.describe(made._packed)["m"] == w.m
    assert torch.equal(made.values.cpu(), w.values) and torch.equal(made.metadata.cpu(), w.metadata)
    assert not made.is_packed


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_go_through_a_packed_weight(case):
    made, w = layer(case, torch.float32)
    made.pack()
    x = torch.randn(3, w.n, device="cuda", requires_grad=True)
    y = made(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert made.is_packed
    packed_cases.assert_close(x.grad, dy.double() @ w.dense.cuda())
    packed_cases.assert_close(made.bias.grad, dy.double().sum(0))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_graph_is_captured_and_replayed(case, tokens):
    made, w = layer(case)
    assert pack_weights(nn.Sequential(made)) == 1
    x = torch.zeros(tokens, w.n, device="cuda").bfloat16()
    with torch.no_grad():
        made(x)  # compiles the kernel
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x)
        for _ in range(2):
            x.normal_()
            graph.replay()
            packed_cases.assert_close(y, expected(x, made, w))


@pytest.mark.gpu
def test_a_product_does_not_wait_for_the_gpu():
    made, w = layer(CASES[2])
    x = torch.randn(1, w.n, device="cuda").bfloat16()
    with torch.no_grad():
        made(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = [made(x[:1].expand(tokens, -1)) for tokens in (1, 2, 40)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    packed_cases.assert_close(y[-1], expected(x.expand(40, -1), made, w))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_runs_packed(mode):
    layers = [layer(("2:4", 64, 128, None)), layer(("unstructured", 128, 64, 0.75))]
    model = nn.Sequential(*(made for made, _ in layers))
    assert pack_weights(model) == 2
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 128, device="cuda").bfloat16()
            y = compiled(x)
            hidden = expected(x, *layers[0]).bfloat16()
            assert packed_cases.error(y, expected(hidden, *layers[1])) < 1e-2
    assert all(made.is_packed for made, _ in layers)
