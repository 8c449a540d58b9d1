"""Experts: both operators against a float64 computation of the equation, for every pattern and activation."""

import ctypes
import threading

import pytest
import torch

from helpers import compressed
from sparse_rt.benchmarking.processes import status_bytes
from sparse_rt.errors import BackendError, UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels import experts as moe
from sparse_rt.kernels import packed
from sparse_rt.kernels.native import library
from sparse_rt.kernels.native.checks import NUMBERS
from sparse_rt.kernels.native.experts import FUNCTIONS, join

HIDDEN, INTERMEDIATE, EXPERTS = 48, 40, 5
PATTERNS = ("2:4", "unstructured", "4:8")


def layer(pattern, activation="silu", dtype=torch.float32, sparsity=0.6):
    """[(values, metadata, dense)] of every expert, up and down."""
    rows = INTERMEDIATE * (2 if moe.is_gated(activation) else 1)
    up = [compressed(rows, HIDDEN, pattern, sparsity, dtype, seed=e) for e in range(EXPERTS)]
    return up, [compressed(HIDDEN, INTERMEDIATE, pattern, sparsity, dtype, seed=50 + e) for e in range(EXPERTS)]


def routing(tokens, k, seed=0, missing=()):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)]).view(tokens, k)
    weights = torch.rand(tokens, k, generator=generator)
    for expert in missing:
        ids[ids == expert] = -1
    return weights, ids


def expected(x, weights, ids, up, down, activation):
    """The equation in float64; the weights of other ranks' experts add nothing."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            if expert >= 0:
                h = moe.activate(up[expert][2].double() @ x[token].double(), activation)
                y[token] += weight * (down[expert][2].double() @ h)
    return y


def tall(parts):
    return torch.cat([values for values, *_ in parts]), torch.cat([metadata for _, metadata, _ in parts])


def run(x, weights, ids, up, down, pattern, activation="silu"):
    return moe.experts(*(x, weights, ids, *tall(up), *tall(down)), pattern, pattern, EXPERTS, INTERMEDIATE, activation)


def pack_all(parts, pattern):
    return join([packed.pack(values, metadata, pattern, *dense.shape) for values, metadata, dense in parts])


def run_packed(x, weights, ids, up, down, pattern, activation="silu"):
    operands = *pack_all(up, pattern), *pack_all(down, pattern)
    return moe.packed_experts(x, weights, ids, *operands, INTERMEDIATE, activation)


native = pytest.mark.skipif(library.unavailable_reason() is not None, reason="no native kernels here")
RUNS = [pytest.param(run, id="canonical"), pytest.param(run_packed, id="packed", marks=native)]


@pytest.mark.parametrize("call", RUNS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens,k", [(1, 1), (1, 2), (3, 2), (70, 3)])
def test_the_sum_over_experts_is_that_of_the_equation(call, pattern, tokens, k):
    up, down = layer(pattern)
    x = torch.randn(tokens, HIDDEN)
    weights, ids = routing(tokens, k)
    wanted = expected(x, weights, ids, up, down, "silu")
    assert (call(x, weights, ids, up, down, pattern) - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("call", RUNS)
@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_every_activation(call, activation):
    up, down = layer("unstructured", activation)
    x = torch.randn(6, HIDDEN)
    weights, ids = routing(6, 2)
    wanted = expected(x, weights, ids, up, down, activation)
    assert (call(x, weights, ids, up, down, "unstructured", activation) - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("call", RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_narrow_dtypes_round_between_the_products(call, dtype, ids_dtype):
    up, down = layer("2:4", dtype=dtype)
    x = torch.randn(9, HIDDEN).to(dtype)
    weights, ids = routing(9, 2)
    found = call(x, weights, ids.to(ids_dtype), up, down, "2:4")
    wanted = expected(x, weights, ids, up, down, "silu")
    assert found.dtype == dtype and (found - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("call", RUNS)
def test_experts_of_other_ranks_add_nothing(call):
    up, down = layer("2:4")
    x = torch.randn(8, HIDDEN)
    weights, ids = routing(8, 2, missing=(0, 3))
    wanted = expected(x, weights, ids, up, down, "silu")
    assert torch.allclose(call(x, weights, ids, up, down, "2:4").double(), wanted, atol=1e-4)
    nowhere = torch.full_like(ids, -1)
    assert not call(x, weights, nowhere, up, down, "2:4").any()


@pytest.mark.parametrize("call", RUNS)
def test_no_token_and_rows_that_are_not_contiguous(call):
    up, down = layer("unstructured")
    weights, ids = routing(4, 2)
    x = torch.randn(4, 2 * HIDDEN)[:, ::2]
    wanted = expected(x, weights, ids, up, down, "silu")
    assert (call(x, weights, ids, up, down, "unstructured") - wanted).norm() <= 1e-6 * wanted.norm()
    assert call(x[:0], weights[:0], ids[:0], up, down, "unstructured").shape == (0, HIDDEN)


def test_an_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'swish' are not supported; known are .*silu"):
        moe.is_gated("swish")


@native
def test_both_operators_are_seen_by_the_compiler():
    up, down = layer("2:4")
    x = torch.randn(3, HIDDEN)
    weights, ids = routing(3, 2)
    how = ("2:4", "2:4", EXPERTS, INTERMEDIATE, "silu")
    torch.library.opcheck(torch.ops.sparse_rt.experts, (x, weights, ids, *tall(up), *tall(down), *how))
    operands = *pack_all(up, "2:4"), *pack_all(down, "2:4")
    torch.library.opcheck(torch.ops.sparse_rt.packed_experts, (x, weights, ids, *operands, INTERMEDIATE, "silu"))


# ---- the packed operator on the CPU


def operands(pattern, dtype=torch.float32, **how):
    up, down = layer(pattern, dtype=dtype, **how)
    return up, down, [*pack_all(up, pattern), *pack_all(down, pattern)]


@native
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize("pattern,sparsity", [("2:4", 0.5), ("unstructured", 0.5), ("unstructured", 0.9)])
def test_every_instruction_set_and_layout(isa, dtype, pattern, sparsity):
    up, down, tensors = operands(pattern, dtype, sparsity=sparsity)
    for tokens in (1, 3, 90):
        x = torch.randn(tokens, HIDDEN).to(dtype)
        weights, ids = routing(tokens, 2)
        found = moe.packed_experts(x, weights, ids, *tensors, INTERMEDIATE, "silu")
        wanted = expected(x, weights, ids, up, down, "silu")
        assert (found - wanted).norm() <= (2 * torch.finfo(dtype).eps + 1e-6) * wanted.norm(), tokens


@native
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_activation_is_rounded_once(isa, dtype, function):
    """Weights of ones on the diagonal leave the activation alone: of every number of a narrow dtype up to 200."""
    one = compressed_identity(16, dtype)
    if dtype == torch.float32:
        x = torch.cat((torch.randn(2**12) * 4, torch.linspace(-80, 80, 2**12)))
    else:
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        x = torch.where((x.abs() <= 200) & (x.abs() >= torch.finfo(dtype).tiny), x, 0)
    x = x.view(-1, 16)
    ids, weights = torch.zeros(len(x), 1, dtype=torch.int32), torch.ones(len(x), 1)
    found = moe.packed_experts(x, weights, ids, *one, *one, 16, f"{function}_no_mul")
    exact = moe.activate(x.double(), f"{function}_no_mul")
    # Half a unit, and what float32 loses before: gelu_tanh multiplies up to 14 rounding errors in its exponent, and
    # gelu (like torch's) takes the difference of numbers near 1.
    allowed = exact.abs() * (torch.finfo(dtype).eps / 2 + 2e-6) + 1e-7
    assert ((found.double() - exact).abs() <= allowed).all()


def compressed_identity(size, dtype):
    fmt, one = get_format("unstructured"), torch.eye(size, dtype=dtype)
    return join([packed.pack(*fmt.compress(one, one != 0), "unstructured", size, size)])


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_activation_is_rounded_before_it_multiplies(isa, dtype):
    """As modules that run one after the other do: with up = [1; 1] the result is round(round(silu(x)) x)."""
    fmt, twice = get_format("unstructured"), torch.cat((torch.eye(16), torch.eye(16))).to(dtype)
    up = join([packed.pack(*fmt.compress(twice, twice != 0), "unstructured", 32, 16)])
    x = torch.randn(64, 16).to(dtype)
    ids, weights = torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1)
    found = moe.packed_experts(x, weights, ids, *up, *compressed_identity(16, dtype), 16, "silu")
    assert torch.equal(found, moe.activate(torch.cat((x, x), 1), "silu"))


@native
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_the_number_of_threads_changes_no_bit(isa, threads, dtype):
    _, _, tensors = operands("unstructured", dtype)
    for tokens in (1, 5, 200):
        x, found = torch.randn(tokens, HIDDEN).to(dtype), []
        weights, ids = routing(tokens, 3)
        for count in (1, 2, 3, 1):
            threads(count)
            found.append(moe.packed_experts(x, weights, ids, *tensors, INTERMEDIATE, "silu"))
        assert all(torch.equal(found[0], other) for other in found[1:]), tokens


@native
@pytest.mark.parametrize(
    "tokens,intermediate,share",
    [
        pytest.param(5000, 8, 0.5, id="more tokens than have sums at once"),
        pytest.param(400, 8192, 0.5, id="two experts that do not fit into a batch together"),
        pytest.param(400, 8192, 1.0, id="an expert that does not fit into a batch"),
    ],
)
def test_many_tokens_are_worked_on_in_parts(threads, tokens, intermediate, share):
    threads(2)
    up = [compressed(2 * intermediate, 16, "2:4", seed=e) for e in range(2)]
    down = [compressed(16, intermediate, "2:4", seed=5 + e) for e in range(2)]
    x, weights = torch.randn(tokens, 16), torch.rand(tokens, 2)
    ids = (torch.rand(tokens, 2) < share).long()
    ids[::7, 0] = -1
    tensors = *pack_all(up, "2:4"), *pack_all(down, "2:4")
    found = moe.packed_experts(x, weights, ids, *tensors, intermediate, "silu")
    per_expert = [
        moe.activate(x.double() @ one.double().t(), "silu") @ other.double().t()
        for (*_, one), (*_, other) in zip(up, down, strict=True)
    ]
    wanted = sum((weights * (ids == e)).sum(1, keepdim=True) * y for e, y in enumerate(per_expert))
    assert (found - wanted).norm(dim=1).max() <= 1e-6 * wanted.norm(dim=1).max()


@native
def test_a_prompt_of_any_length_needs_bounded_work_space():
    """6400 assignments of 96 KB: the products of two experts, in a thread that starts without a buffer."""
    up = join([packed.pack(*compressed(16384, 16, "2:4")[:2], "2:4", 16384, 16)] * 2)
    down = join([packed.pack(*compressed(16, 8192, "2:4")[:2], "2:4", 16, 8192)] * 2)
    x, weights, ids = torch.randn(400, 16), torch.rand(400, 16), torch.randint(0, 2, (400, 16))
    grown = []

    def work():
        before = status_bytes("VmRSS")
        moe.packed_experts(x, weights, ids, *up, *down, 8192, "silu")
        grown.append(status_bytes("VmRSS") - before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert grown[0] < 128 << 20


@native
def test_rows_of_a_larger_tensor_and_weights_of_another_dtype():
    up, down, tensors = operands("2:4")
    weights, ids = routing(4, 2)
    x = torch.full((4, 2 * HIDDEN), torch.nan)
    x[:, :HIDDEN] = torch.randn(4, HIDDEN)
    weights = weights.bfloat16()
    wanted = expected(x[:, :HIDDEN], weights, ids, up, down, "silu")
    found = moe.packed_experts(x[:, :HIDDEN], weights, ids.t().contiguous().t(), *tensors, INTERMEDIATE, "silu")
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@native
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [EXPERTS, -2, 2**31 - 1])
def test_an_expert_that_is_not_there_is_named(dtype, wrong):
    _, _, tensors = operands("2:4")
    weights, ids = routing(4, 2)
    ids[2, 1] = wrong
    with pytest.raises(UserError, match=rf"expert {wrong}; allowed are 0 to 4, or -1"):
        moe.packed_experts(torch.randn(4, HIDDEN), weights, ids.to(dtype), *tensors, INTERMEDIATE, "silu")


@native
@pytest.mark.parametrize("name,position", [("up", 1), ("down", 3)])
@pytest.mark.parametrize(
    "span",
    [(-64, 2000), (0, 2**40), (2**40, 2**40 + 4096), (640, 64), (64, 4096), (3, 2000), (0, 8), (2**62, -(2**62))],
)
def test_a_span_without_a_weight_is_refused_where_it_is_used(name, position, span):
    up, down, tensors = operands("2:4")
    weights, ids = routing(4, 2)
    ids[ids == 3] = 1
    x = torch.randn(4, HIDDEN)
    tensors[position] = tensors[position].clone()
    tensors[position][3] = torch.tensor(span)
    wanted = expected(x, weights, ids, up, down, "silu")
    found = moe.packed_experts(x, weights, ids, *tensors, INTERMEDIATE, "silu")
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    ids[1, 0] = 3
    with pytest.raises(BackendError, match=f"span of expert 3 in {name} does not hold a packed"):
        moe.packed_experts(x, weights, ids, *tensors, INTERMEDIATE, "silu")


@native
def test_a_weight_that_is_not_aligned_is_refused():
    up, down = layer("2:4")
    (ups, spans), (downs, down_spans) = pack_all(up, "2:4"), pack_all(down, "2:4")
    x, (weights, ids) = torch.randn(4, HIDDEN), routing(4, 2)
    moved = torch.cat((ups[:4], ups)), spans + 4
    with pytest.raises(BackendError, match=r"in up does not hold a packed .* weight at a multiple of 8 bytes"):
        moe.packed_experts(x, weights, ids, *moved, downs, down_spans, INTERMEDIATE, "silu")


@native
def test_weights_of_another_shape_or_dtype_are_refused():
    _, _, (up, up_spans, down, down_spans) = operands("2:4")
    x, (weights, ids) = torch.randn(4, HIDDEN), routing(4, 2)
    with pytest.raises(BackendError, match=rf"in up does not hold a packed \({INTERMEDIATE}, {HIDDEN}\) weight"):
        moe.packed_experts(x, weights, ids, up, up_spans, down, down_spans, INTERMEDIATE, "silu_no_mul")
    with pytest.raises(
        BackendError, match=r"x is torch.bfloat16, the packed values of expert \d are not; they must be"
    ):
        moe.packed_experts(x.bfloat16(), weights, ids, up, up_spans, down, down_spans, INTERMEDIATE, "silu")


@native
@pytest.mark.parametrize(
    "change,reason",
    [
        ({"x": torch.zeros(HIDDEN)}, r"x is \[tokens, hidden\]"),
        ({"x": torch.zeros(3, HIDDEN)}, r"3 tokens have weights \[3, k\]"),
        ({"weights": torch.zeros(4, 3)}, r"4 tokens have weights \[4, k\]"),
        ({"ids": torch.zeros(4, 2, dtype=torch.int16)}, "int32 or int64 ids"),
        ({"up": torch.zeros(64)}, "packed weights are contiguous uint8"),
        ({"up_spans": torch.zeros(5, 2)}, r"spans are contiguous int64 \[experts, 2\]"),
        ({"down_spans": torch.zeros(4, 2, dtype=torch.int64)}, r"got int64 \(5, 2\) and int64 \(4, 2\)"),
        ({"intermediate": 0}, "an intermediate size of 0"),
    ],
)
def test_arguments_that_do_not_fit_each_other_are_refused(change, reason):
    _, _, (up, up_spans, down, down_spans) = operands("2:4")
    weights, ids = routing(4, 2)
    arguments = dict(x=torch.randn(4, HIDDEN), weights=weights, ids=ids, up=up, up_spans=up_spans, down=down)
    arguments |= dict(down_spans=down_spans, intermediate=INTERMEDIATE, activation="silu") | change
    with pytest.raises(UserError, match=reason):
        moe.packed_experts(**arguments)


@native
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize("tokens,intermediate", [(1, 7), (3, 21), (30, 40)])
def test_nothing_outside_of_the_operands_is_touched(isa, guarded, dtype, tokens, intermediate):
    hidden = 45
    up = [compressed(2 * intermediate, hidden, "unstructured", 0.5, dtype, seed=e) for e in range(2)]
    down = [compressed(hidden, intermediate, "unstructured", 0.5, dtype, seed=5 + e) for e in range(2)]
    up, up_spans, down, down_spans = *pack_all(up, "unstructured"), *pack_all(down, "unstructured")
    x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, 2)
    ids = torch.randint(0, 2, (tokens, 2), dtype=torch.int32)
    wanted = moe.packed_experts(x, weights, ids, up, up_spans, down, down_spans, intermediate, "silu")
    result, culprit = guarded(torch.empty_like(x)), torch.zeros(1, dtype=torch.int64)
    code = library.load().handle.srt_packed_experts(
        *(guarded(x), hidden, tokens, hidden, NUMBERS[dtype], guarded(weights), guarded(ids), 4, 2),
        *(guarded(up), up.numel(), guarded(up_spans), guarded(down), down.numel(), guarded(down_spans)),
        *(2, intermediate, FUNCTIONS.index("silu"), 1, result, culprit.data_ptr(), 1),
    )
    assert code == 0 and ctypes.string_at(result, wanted.nbytes) == bytes(wanted.view(torch.uint8).flatten().tolist())
