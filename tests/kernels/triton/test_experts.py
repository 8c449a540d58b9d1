"""experts against float64: every pattern, activation and dtype, and every way in which tokens can be spread."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import packed_cases
from sparse_rt.errors import BackendError
from sparse_rt.kernels import backends
from sparse_rt.kernels import experts as moe
from sparse_rt.kernels.backends import Call

pytest.importorskip("triton")
from sparse_rt.kernels.triton import dispatch, ops
from sparse_rt.kernels.triton import experts as kernels

EXPERTS = 3
# (pattern, intermediate, hidden, sparsity): no multiple of 8, 32 or 128 columns, several blocks of columns and of rows
CASES = (
    ("2:4", 4, 4, None),
    ("2:4", 36, 60, None),
    ("2:4", 68, 136, None),
    ("4:8", 24, 136, None),
    ("unstructured", 1, 3, 0.5),
    ("unstructured", 17, 130, 0.5),
    ("unstructured", 66, 33, 0.9),
    ("unstructured", 33, 60, 0.0),
    ("unstructured", 33, 60, 1.0),
)
TWO_FOUR, BITMASK = CASES[1], CASES[5]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Layer:
    """Up and down of a few experts on ``device``; ``down`` another case gives its pattern."""

    def __init__(self, device, case, activation="silu", dtype=FP32, values=None, down=None):
        pattern, self.intermediate, self.hidden, sparsity = case
        self.activation, self.dtype, self.gated = activation, dtype, moe.is_gated(activation)
        rows, values = self.intermediate * (2 if self.gated else 1), values or dtype
        weight, down_pattern = packed_cases.weight, down or pattern
        self.up = [weight(pattern, rows, self.hidden, sparsity, values, e) for e in range(EXPERTS)]
        self.down = [
            weight(down_pattern, self.hidden, self.intermediate, sparsity or 0.5, values, 9 + e) for e in range(EXPERTS)
        ]
        self.device, self.how = device, (pattern, down_pattern, EXPERTS, self.intermediate, activation)

    @property
    def weights(self):
        parts = ([getattr(w, name) for w in side] for side in (self.up, self.down) for name in ("values", "metadata"))
        return [torch.cat(part).to(self.device) for part in parts]

    def x(self, tokens):
        return torch.randn(tokens, self.hidden).to(self.device, self.dtype)

    def run(self, x, weights, ids, call=kernels.experts):
        return call(x, weights.to(self.device), ids.to(self.device), *self.weights, *self.how)

    def expected(self, x, weights, ids):
        """The equation in float64, rounded to the dtype where the kernels round."""
        x, y = x.cpu(), torch.zeros(x.shape, dtype=torch.float64)
        for token, slot in ((t, j) for t in range(ids.shape[0]) for j in range(ids.shape[1])):
            expert = int(ids[token, slot])
            if 0 <= expert < EXPERTS:
                h = (self.up[expert].dense @ x[token].double()).to(self.dtype)
                h = moe.activate(h.double() if self.dtype == FP32 else h, self.activation).double()
                y[token] += float(weights[token, slot]) * (self.down[expert].dense @ h).to(self.dtype).double()
        return y

    def check(self, x, weights, ids, *case):
        found = self.run(x, weights, ids)
        assert found.dtype == self.dtype and found.shape == x.shape
        packed_cases.assert_close(found.cpu(), self.expected(x, weights, ids), *case)


def routing(tokens, k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)]
    return torch.rand(tokens, k, generator=generator), torch.stack(order)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pattern_and_shape(device, case):
    layer = Layer(device, case)
    for tokens, k in ((1, 1), (3, 2), (17, 3)):
        layer.check(layer.x(tokens), *routing(tokens, k), tokens, k)


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
@pytest.mark.parametrize("case", (TWO_FOUR, BITMASK), ids=str)
def test_narrow_dtypes_are_rounded_between_the_products(device, case, dtype):
    layer = Layer(device, case, dtype=dtype)
    layer.check(layer.x(9), *routing(9))


@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_every_activation(device, activation):
    for dtype in (BF16, FP32):
        layer = Layer(device, ("unstructured", 17, 33, 0.5), activation, dtype)
        layer.check(layer.x(6) * 2, *routing(6, 1), dtype)


def test_the_activations_are_those_of_torch_far_from_zero_too(device):
    layer = Layer(device, ("unstructured", 1, 1, 0.0))
    layer.up = [packed_cases.Weight(*w, "unstructured", 2, 1, torch.ones(2, 1)) for w in [ones(2, 1)] * EXPERTS]
    layer.down = [packed_cases.Weight(*w, "unstructured", 1, 1, torch.ones(1, 1)) for w in [ones(1, 1)] * EXPERTS]
    x = torch.tensor([[-200.0], [-12.0], [-1e-3], [0.0], [5.0], [90.0], [1e15]], device=device)
    weights, ids = torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64)
    for activation in ("silu", "gelu", "gelu_tanh"):
        layer.how = (*layer.how[:-1], activation)
        wanted = moe.activate(x.double().expand(-1, 2), activation)
        torch.testing.assert_close(layer.run(x, weights, ids).double(), wanted, rtol=1e-5, atol=1e-7, msg=activation)


def ones(m, n):
    return torch.ones(m * n), torch.full((m, 1), (1 << n) - 1, dtype=torch.uint8)


@pytest.mark.parametrize("case", (TWO_FOUR, BITMASK), ids=str)
def test_more_tokens_than_a_block_on_few_experts(device, case):
    layer = Layer(device, case)
    for tokens, spread in ((40, lambda ids: ids % 2), (21, lambda ids: ids * 0 + 1), (190, lambda ids: ids * 0 + 2)):
        weights, ids = routing(tokens)
        layer.check(layer.x(tokens), weights, spread(ids), tokens)


@pytest.mark.parametrize("ids_dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("case", (TWO_FOUR, BITMASK), ids=str)
def test_experts_of_other_ranks_add_nothing(device, case, ids_dtype, monkeypatch):
    empty = torch.full  # what is not written shows
    monkeypatch.setattr(torch, "empty", lambda size, **how: empty(size, float("nan"), **how))
    layer = Layer(device, case)
    weights, ids = routing(8)
    ids[ids == 1] = -1
    ids[2], ids[5, 0] = -1, EXPERTS
    layer.check(layer.x(8), weights, ids.to(ids_dtype))
    assert torch.equal(layer.run(layer.x(8), weights, torch.full_like(ids, -1)).cpu(), torch.zeros(8, layer.hidden))


@pytest.mark.parametrize("case", (TWO_FOUR, BITMASK), ids=str)
def test_no_tokens_and_tokens_inside_nan(device, case):
    layer = Layer(device, case)
    weights, ids = routing(4)
    assert layer.run(layer.x(0), weights[:0], ids[:0]).shape == (0, layer.hidden)
    assert not layer.run(layer.x(4), weights[:, :0], ids[:, :0]).any()
    layer.check(packed_cases.inside_nan(layer.x(4).cpu()).to(device), weights, ids)
    layer.check(layer.x(2 * layer.hidden).view(layer.hidden, -1)[:, :4].T, weights, ids)
    layer.check(layer.x(4), weights.T.contiguous().T, ids.T.contiguous().T)


@pytest.mark.parametrize("case", (TWO_FOUR, BITMASK), ids=str)
def test_padding_bits_are_not_read(device, case):
    layer = Layer(device, case)
    x, (weights, ids) = layer.x(5), routing(5)
    wanted = layer.run(x, weights, ids)
    up_values, up_metadata, *down = layer.weights
    poisoned = up_metadata.clone()
    poisoned[:, -1] |= 0xF0 if case == TWO_FOUR else 0xFC
    assert not torch.equal(poisoned, up_metadata)
    found = kernels.experts(x, weights.to(device), ids.to(device), up_values, poisoned, *down, *layer.how)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("case", (TWO_FOUR, BITMASK), ids=str)
def test_results_repeat_and_wide_values_are_rounded_once(device, case):
    wide, narrow = Layer(device, case, dtype=BF16, values=FP32), Layer(device, case, dtype=BF16)
    x, (weights, ids) = wide.x(5), routing(5, 3)
    first = wide.run(x, weights, ids)
    assert torch.equal(first, wide.run(x, weights, ids)) and torch.equal(first, narrow.run(x, weights, ids))
    assert first.dtype == BF16


def test_up_and_down_may_have_different_patterns(device):
    layer = Layer(device, ("2:4", 36, 60, None), down="unstructured")
    layer.check(layer.x(7), *routing(7))


# ---- how tokens are grouped -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", (1, 4, 16))
@pytest.mark.parametrize("tokens,k,experts", [(1, 1, 1), (1, 4, 8), (7, 2, 3), (100, 3, 5), (64, 1, 200)])
def test_every_assignment_is_in_one_block_of_its_expert(device, tokens, k, experts, block):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(-1, experts + 1, (tokens, k), generator=generator).to(device)
        found = kernels.route(ids, experts, block)
        assert found.expert.numel() == kernels.most_blocks(tokens * k, experts, block)
        order, starts, ends, of_block = (part.tolist() for part in found)
        seen = []
        for number, expert in enumerate(of_block):
            if expert < experts:
                blocks = -(-(starts[expert + 1] - starts[expert]) // block)
                first = starts[expert] + (number - (ends[expert] - blocks)) * block
                chosen = order[first : min(first + block, starts[expert + 1])]
                assert chosen and ids.flatten()[chosen].tolist() == [expert] * len(chosen)
                assert chosen == sorted(chosen), "in the order of the tokens"
                seen += chosen
        assert sorted(seen) == ((ids.flatten() >= 0) & (ids.flatten() < experts)).nonzero().flatten().tolist()


@pytest.mark.parametrize("assignments,experts,block", [(1, 8, 16), (8, 8, 16), (9, 2, 4), (300, 7, 16), (64, 1, 64)])
def test_no_routing_fills_more_blocks_and_one_fills_them(device, assignments, experts, block):
    spread = [min(expert, assignments - 1) for expert in range(min(assignments, experts))]
    ids = torch.tensor(spread + [0] * (assignments - len(spread)), device=device)[:, None]
    found = kernels.route(ids, experts, block)
    assert int(found.ends[-1]) == kernels.most_blocks(assignments, experts, block) == found.expert.numel()


def test_grouping_asks_the_device_for_nothing():
    """Whatever would wait for data (``item``, shapes that depend on it) is an error on tensors without data."""
    with FakeTensorMode():
        found = kernels.route(torch.empty(33, 4, dtype=torch.int32), 16, 16)
        assert [tuple(part.shape) for part in found] == [(132,), (17,), (16,), (16 + (132 - 16) // 16,)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_graph_follows_other_routings(device):
    layer = Layer(device, TWO_FOUR, dtype=BF16)
    x, (weights, ids), stored = layer.x(40), routing(40), layer.weights
    weights, ids = weights.to(device), ids.to(device)
    kernels.experts(x, weights, ids, *stored, *layer.how)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.experts(x, weights, ids, *stored, *layer.how)
    for seed in range(3):
        weights2, ids2 = routing(40, seed=seed)
        ids2[seed] = -1
        weights.copy_(weights2), ids.copy_(ids2), x.copy_(layer.x(40))
        graph.replay()
        packed_cases.assert_close(y.cpu(), layer.expected(x, weights2, ids2), seed)


# ---- the operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ("measured", "none"))
def test_the_operator_chooses_it_for_any_number_of_tokens_whatever_was_measured(device, setting, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, setting)
    for pattern in ("2:4", "unstructured", "4:8"):
        for tokens in (1, 100_000):
            call = Call("experts", pattern, 64, 64, tokens, BF16, device)
            assert backends.explain(call).backend.name == "triton"
    layer, used = Layer(device, TWO_FOUR, dtype=BF16), []
    x, (weights, ids) = layer.x(6), routing(6)
    wanted = layer.run(x, weights, ids)
    real = kernels.experts
    monkeypatch.setattr(kernels, "experts", lambda *arguments: (used.append(1), real(*arguments))[1])
    assert torch.equal(layer.run(x, weights, ids, moe.experts), wanted) and used


def test_a_pattern_of_down_that_the_kernels_cannot_read_is_refused(device, monkeypatch):
    layer = Layer(device, TWO_FOUR)
    monkeypatch.setattr(ops, "unreadable", lambda pattern: "no" if pattern == "4:8" else None)
    layer.how = ("2:4", "4:8", *layer.how[2:])
    with pytest.raises(BackendError, match="down_pattern: no"):
        layer.run(layer.x(2), *routing(2), moe.experts)
