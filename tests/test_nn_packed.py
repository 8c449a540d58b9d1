"""A SparseLinear in inference holds the derived layout of its weight; whoever asks for the canonical tensors, or
changes them, never notices."""

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
from torch import nn

from packed_cases import TOLERANCE, assert_close, error, weight
from sparse_rt.errors import FormatError, UserError
from sparse_rt.kernels import packed
from sparse_rt.nn import PACK_VARIABLE, SparseLinear, pack_weights

CASES = (("2:4", None), ("4:8", None), ("unstructured", 0.5), ("unstructured", 0.9))
M, N = 40, 72


def layer(pattern="unstructured", sparsity=0.5, dtype=torch.bfloat16, m=M, n=N, seed=0):
    w = weight(pattern, m, n, sparsity, dtype, seed)
    torch.manual_seed(seed)
    made = SparseLinear(n, m, pattern, w.values.clone(), w.metadata.clone(), torch.randn(m).to(dtype))
    return made.eval(), w


def run(made, tokens=5):
    torch.manual_seed(1)
    with torch.no_grad():
        return made(torch.randn(tokens, made.in_features).to(made.bias.dtype))


def packed_layer(*arguments, **options):
    made, w = layer(*arguments, **options)
    run(made)
    assert made.is_packed
    return made, w


def is_canonical(made, w):
    return not made.is_packed and torch.equal(made.values, w.values) and torch.equal(made.metadata, w.metadata)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern, sparsity", CASES)
def test_the_first_call_in_inference_packs(monkeypatch, pattern, sparsity, dtype):
    made, w = layer(pattern, sparsity, dtype)
    assert not made.is_packed
    served = [run(made, tokens) for tokens in (1, 5, 40)]
    assert made.is_packed
    for y in served:
        torch.manual_seed(1)
        x = torch.randn(y.shape[0], N).to(dtype)
        assert_close(y, x.double() @ w.dense.T + made.bias.double())
    monkeypatch.setenv(PACK_VARIABLE, "0")
    made.unpack()
    canonical = [run(made, tokens) for tokens in (1, 5, 40)]
    assert not made.is_packed
    for one, other in zip(served, canonical, strict=True):
        assert error(one, other.double()) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("pattern, sparsity", CASES[:3])
def test_packing_takes_no_more_memory(pattern, sparsity):
    made, w = layer(pattern, sparsity, m=512, n=1024)
    before = made.weight_nbytes
    assert before == w.values.nbytes + w.metadata.nbytes
    run(made)
    assert made.is_packed and made.weight_nbytes <= 1.02 * before + 1024
    held = [t for t in made.__dict__["_parameters"].values() if t.device.type != "meta"]
    assert sum(t.nbytes for t in held) == made.bias.nbytes, "the canonical tensors are gone"


def test_the_high_sparsity_layout_says_what_it_takes():
    """`slots` spends a byte on the place of each value and fills up steps: more than the bitmask, less than dense."""
    made, _ = packed_layer(sparsity=0.9, m=512, n=1024)
    assert made.weight_nbytes == packed.pack(made.values, made.metadata, "unstructured", 512, 1024).nbytes
    assert made.weight_nbytes < 512 * 1024 * 2 / 2


ASKS = {
    "values": lambda made: made.values,
    "metadata": lambda made: made.metadata,
    "weight_values": lambda made: made.weight_values,
    "getattr": lambda made: getattr(made, made.format.metadata_name),
    "get_parameter": lambda made: made.get_parameter("weight_values"),
    "state_dict": lambda made: made.state_dict(),
    "state_dict of a parent": lambda made: nn.Sequential(made).state_dict(),
    "mask": lambda made: made.mask(),
    "decompress": lambda made: made.decompress(),
    "to_dense": lambda made: made.to_dense(),
    "cpu": lambda made: made.cpu(),
    "to": lambda made: made.to(torch.bfloat16),
    "share_memory": lambda made: made.share_memory(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda made: torch.save(made, io.BytesIO()),
    "a training call": lambda made: made.train()(torch.randn(2, N).bfloat16()),
    "unpack": lambda made: made.unpack(),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("pattern, sparsity", CASES)
def test_whoever_asks_gets_the_canonical_tensors(pattern, sparsity, ask):
    made, w = packed_layer(pattern, sparsity)
    ASKS[ask](made)
    assert is_canonical(made, w)
    expected = run(made.eval())
    assert made.is_packed and torch.equal(run(made), expected)


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("pattern, sparsity", CASES)
def test_copies_are_canonical_and_complete(pattern, sparsity, inference):
    made, w = layer(pattern, sparsity)
    with inference():
        made(torch.randn(3, N).bfloat16())
    assert made.is_packed
    copies = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    for other in copies:
        assert is_canonical(other, w) and torch.equal(other.bias, made.bias)
        assert torch.equal(run(other), run(made))
    state = made.state_dict()
    assert torch.equal(state["weight_values"], w.values) and torch.equal(state[made.format.metadata_name], w.metadata)


@pytest.mark.parametrize("asked_in", [torch.no_grad, torch.inference_mode])
def test_tensors_that_come_back_in_inference_mode_can_be_trained_with(asked_in):
    made, w = packed_layer()
    with asked_in():
        assert torch.equal(made.values, w.values)
    x = torch.randn(3, N).bfloat16().requires_grad_()
    made.train()(x).sum().backward()
    assert x.grad is not None and made.bias.grad is not None
    made.values.add_(1)  # an inference tensor would refuse


def test_counts_and_shapes_stay_right_while_packed():
    made, w = layer("2:4", None)
    model = nn.Sequential(made, nn.GELU())
    before = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    total = sum(p.numel() for p in model.parameters())
    run(made)
    assert {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before
    assert sum(p.numel() for p in model.parameters()) == total
    assert (made.nnz, made.sparsity) == (w.values.numel(), 0.5) and "sparsity=0.500" in repr(made)
    model.requires_grad_(False)
    model.zero_grad()
    model.eval()
    assert made.is_packed, "none of these needs the weight"


def test_a_changed_dtype_is_served_in_it():
    made, w = packed_layer()
    made.to(torch.float32)
    assert made.values.dtype == torch.float32 and torch.equal(made.values, w.values.float())
    y = run(made)
    assert made.is_packed and y.dtype == torch.float32
    torch.manual_seed(1)
    assert_close(y, torch.randn(5, N).double() @ w.dense.T + made.bias.double())


def test_loading_other_weights_leaves_nothing_of_the_old_ones():
    made, _ = packed_layer("2:4", None)
    other, w = layer("2:4", None, seed=5)
    old, state = run(made), other.state_dict()
    for options in ({}, {"assign": True}):
        made.load_state_dict(state, **options)
        assert is_canonical(made, w)
        assert torch.equal(run(made), run(other)) and not torch.equal(run(made), old)


def test_a_state_of_another_size_is_never_served():
    """PyTorch loads what fits before it raises; values and metadata then belong to two weights."""
    made, _ = packed_layer()
    with pytest.raises(RuntimeError, match="size mismatch for weight_values"):
        made.load_state_dict(layer(sparsity=0.9, seed=5)[0].state_dict())
    with pytest.raises(FormatError, match=r"marks \d+ kept weights, there are \d+ values"):
        run(made)


def test_a_change_in_place_is_served():
    made, _ = packed_layer()
    old = run(made)
    with torch.no_grad():
        made.weight_values.mul_(2)
        made.bias.zero_()
    twice = run(made)
    assert made.is_packed
    torch.testing.assert_close(twice, ((old.double() - layer()[0].bias.double()) * 2).bfloat16(), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern, sparsity", CASES)
def test_gradients_through_a_packed_layer(pattern, sparsity, dtype):
    """A frozen model in eval mode with gradients, as for adversarial inputs or prompt tuning."""
    made, w = packed_layer(pattern, sparsity, dtype)
    x = torch.randn(2, 3, N).to(dtype).requires_grad_()
    dy = torch.randn(2, 3, M).to(dtype)
    y = made(x)
    assert made.is_packed
    y.backward(dy)
    assert made.is_packed, "the backward pass leaves the layer as it is"
    assert_close(y, x.detach().double() @ w.dense.T + made.bias.double())
    assert_close(x.grad, dy.double() @ w.dense)
    assert_close(made.bias.grad, dy.double().flatten(0, 1).sum(0))


def test_training_calls_and_calls_with_gradients_do_not_pack():
    for call in (lambda made, x: made.train()(x), lambda made, x: made(x)):
        made, _ = layer()
        call(made, torch.randn(2, N).bfloat16())
        assert not made.is_packed


def test_a_call_in_another_dtype_takes_the_canonical_tensors():
    made, w = packed_layer(dtype=torch.float32)
    made.bias = None  # its dtype would have to be that of x, as in a dense layer
    with torch.no_grad():
        y = made(torch.ones(2, N).bfloat16())
    assert y.dtype == torch.bfloat16 and is_canonical(made, w)


def test_what_is_not_packed_and_why(monkeypatch):
    made, _ = layer()
    monkeypatch.setenv(PACK_VARIABLE, "0")
    run(made)
    assert not made.is_packed and pack_weights(made) == 0
    with pytest.raises(UserError, match="cannot be packed: SPARSE_RT_PACK=0"):
        made.pack()
    monkeypatch.delenv(PACK_VARIABLE)
    made.weight_values.requires_grad_(True)
    with pytest.raises(UserError, match="the values are trained"):
        made.pack()
    run(made)
    assert not made.is_packed
    double, _ = layer(dtype=torch.float32)
    double.double()
    run(double)
    assert not double.is_packed and "not float64" in double.pack_refusal()
    meta = SparseLinear.empty(N, M, True, "2:4", M * N // 2, torch.bfloat16).eval()
    assert meta(torch.empty(3, N, dtype=torch.bfloat16, device="meta")).shape == (3, M)
    assert "on meta" in meta.pack_refusal()


def test_what_accelerate_moves_about_is_not_packed():
    accelerate = pytest.importorskip("accelerate")
    made, _ = layer()
    expected = run(layer()[0])
    model = nn.Sequential(made)
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        torch.manual_seed(1)
        y = model(torch.randn(5, N).bfloat16())
    assert not made.is_packed and "accelerate" in made.pack_refusal()
    assert error(y, expected.double()) <= 2 * TOLERANCE[torch.bfloat16]


def test_pack_weights_counts_what_is_packed():
    model = nn.Sequential(layer()[0], nn.Linear(3, 3), layer("2:4", None)[0], layer(dtype=torch.float32)[0].double())
    assert pack_weights(model) == 2 and pack_weights(model) == 2
    assert [m.is_packed for m in model if isinstance(m, SparseLinear)] == [True, True, False]


@pytest.fixture
def many_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_that_serve_and_threads_that_ask(many_switches):
    """The first call packs, also when several come at once; asking for the tensors meanwhile breaks no call."""
    made, w = layer("2:4", None, m=64, n=128)
    x = torch.randn(3, 128).bfloat16()
    expected = (x.double() @ w.dense.T + made.bias.double()).detach()
    wrong, stop = [], threading.Event()

    def serve():
        while not stop.is_set():
            with torch.no_grad():
                found = error(made(x), expected)
            if found > TOLERANCE[torch.bfloat16]:
                wrong.append(found)

    def ask():
        for _ in range(200):
            if not torch.equal(made.values, w.values) or not torch.equal(made.metadata, w.metadata):
                wrong.append("tensors")
        stop.set()

    def guarded(function):
        try:
            function()
        except Exception as problem:  # a thread's own exception would only be printed
            wrong.append(repr(problem))
            stop.set()

    workers = [threading.Thread(target=guarded, args=(function,)) for function in (serve, serve, ask)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong[:3]
