"""Packed weights: what goes in comes out, what cannot be packed or multiplied is refused, the operator has the shape
rules and gradients of any other, and every weight gets the layout that is said to be best for it."""

import itertools
import re

import pytest
import torch
from torch import nn

from packed_cases import assert_close, layouts, weight
from sparse_rt.errors import BackendError, FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels import backends, packed
from sparse_rt.kernels.native import library
from sparse_rt.kernels.native.packed import DTYPES, PREFER_VARIABLE, SLOTS_FROM, choose_layout
from sparse_rt.nn import SparseLinear, pack_weights

BITS = {2: torch.int16, 4: torch.int32}
PATTERNS = ("2:4", "4:8", "1:4", "unstructured")


def same_bits(one, other):
    integer = BITS[one.element_size()]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(integer), other.view(integer))


@pytest.fixture
def use_isa():
    """Changes the instruction set; skips where the processor has none of that name."""

    def use(name):
        try:
            library.load().use_isa(name)
        except BackendError as error:
            pytest.skip(str(error))

    yield use
    library.load().use_isa("")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_unpack_gives_every_bit_back(isa, pattern, dtype):
    """Any bit patterns: denormals, NaN with a payload, -0.0, stored zeros; an empty and a full row; odd sizes."""
    integer = BITS[dtype.itemsize]
    for m, n in ((1, 8), (17, 72), (64, 136), (70, 1000), (3, 4) if pattern in ("2:4", "1:4") else (5, 24)):
        fmt = get_format(pattern)
        mask = torch.rand(m, n) < 0.4 if pattern == "unstructured" else fmt.mask_from_scores(torch.rand(m, n))
        if pattern == "unstructured":
            mask[0], mask[-1] = True, False
        bits = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, (m, n), dtype=integer)
        bits[torch.rand(m, n) < 0.2] = 0
        bits[torch.rand(m, n) < 0.1] = torch.iinfo(integer).min  # -0.0
        bits[torch.rand(m, n) < 0.1] = 1  # the smallest denormal
        values, metadata = fmt.compress(bits, mask)
        values = values.view(dtype)
        for layout in layouts(pattern, dtype):
            tensor = packed.pack(values, metadata, pattern, m, n, layout)
            found_values, found_metadata = packed.unpack(tensor, pattern, m, n)
            assert same_bits(found_values, values), (layout, m, n)
            assert found_metadata.dtype == torch.uint8 and torch.equal(found_metadata, metadata), (layout, m, n)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_what_is_kept_counts_even_if_it_is_zero(isa, pattern):
    m, n = 18, 136
    mask = get_format(pattern).mask_from_scores(torch.rand(m, n), 0.5)
    values, metadata = get_format(pattern).compress(torch.zeros(m, n, dtype=torch.bfloat16), mask)
    for layout in layouts(pattern, torch.bfloat16):
        tensor = packed.pack(values, metadata, pattern, m, n, layout)
        assert packed.describe(tensor)["nnz"] == m * n // 2
        assert not packed.packed_linear(torch.randn(3, n).bfloat16(), tensor, None, m, n).any()


def test_the_description_says_what_was_packed(isa):
    w = weight("unstructured", 37, 132, 0.75, torch.bfloat16)
    for layout in layouts("unstructured", torch.bfloat16):
        tensor = w.pack(layout)
        expected = {"layout": layout, "dtype": torch.bfloat16, "m": 37, "n": 132, "nnz": w.values.numel()}
        assert packed.describe(tensor).items() >= {**expected, "nbytes": tensor.nbytes}.items()


@pytest.mark.parametrize("m, n, sparsity", [(1024, 1024, 0.5), (512, 2048, 0.75), (1024, 1024, 0.9)])
def test_a_bitmask_layout_takes_the_memory_of_the_canonical_tensors(isa, m, n, sparsity):
    for dtype in DTYPES:
        w = weight("unstructured", m, n, sparsity, dtype)
        assert w.pack("bitmask").nbytes <= 1.02 * (w.values.nbytes + w.metadata.nbytes) + 1024


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_contradictions_are_refused_before_anything_is_read(isa, pattern):
    w = weight(pattern, 37, 132, 0.75, torch.bfloat16)
    for layout in layouts(pattern, torch.bfloat16):
        for values in (w.values[:-1], torch.cat((w.values, w.values[:1]))):
            with pytest.raises(FormatError):
                packed.pack(values, w.metadata, *w.shape, layout)
        with pytest.raises(FormatError, match="shape"):
            packed.pack(w.values, w.metadata[:-1], *w.shape, layout)
        with pytest.raises(FormatError, match="int32"):
            packed.pack(w.values, w.metadata.int(), *w.shape, layout)
        with pytest.raises(UserError, match="every tensor on the CPU"):
            packed.pack(w.values, w.metadata.to("meta"), *w.shape, layout)
    with pytest.raises(FormatError, match=r"marks \d+ kept weights, there are \d+ values"):
        packed.pack(w.values.flatten()[:-1], weight("unstructured", 37, 132, 0.75, torch.bfloat16).metadata,
                    "unstructured", 37, 132)  # fmt: skip


def test_what_cannot_be_packed_says_why(monkeypatch):
    w = weight("2:4", 37, 132, None, torch.float32)
    assert packed.refusal(*w.shape, torch.float32) is None
    for refusal, reason in (
        (packed.refusal(*w.shape, torch.float64), "not float64"),
        (packed.refusal(*w.shape, torch.float32, "xpu"), "the tensors are on xpu"),
        (packed.refusal("2:4", 0, 4, torch.float32), "the weight is empty"),
        (packed.refusal("spiral", 4, 4, torch.float32), "unknown pattern"),
    ):
        assert reason in refusal
    with pytest.raises(BackendError, match=r"a 2:4 weight \(37, 132\) cannot be packed: .*not float64"):
        packed.pack(w.values.double(), w.metadata, *w.shape)
    with pytest.raises(UserError, match="unstructured weight of torch.bfloat16 cannot have the layout 'pairs'"):
        weight("unstructured", 5, 8, 0.5, torch.bfloat16).pack("pairs")
    with pytest.raises(UserError, match="torch.float32 cannot have the layout 'slots'"):
        w.pack("slots")
    monkeypatch.setenv("SPARSE_RT_BACKEND", "reference")
    assert "SPARSE_RT_BACKEND=reference" in packed.refusal(*w.shape, torch.float32)


@pytest.mark.parametrize("grad", [True, False])
def test_operands_that_do_not_fit_are_refused(isa, grad):
    w = weight("2:4", 37, 132, None, torch.bfloat16)
    tensor, x = w.pack(), torch.randn(3, 132).bfloat16()
    bias = torch.zeros(37).bfloat16()

    def refused(sentence, x, tensor, bias=None):
        with torch.set_grad_enabled(grad), pytest.raises(BackendError, match=f"^packed_linear: {sentence}$"):
            packed.packed_linear(x, tensor, bias, 37, 132)

    takes = r"a \(37, 132\) weight takes x \[..., 132\] and a bias \[37\], got"
    refused("x is torch.float32, the packed values are torch.bfloat16; they must be equal", x.float(), tensor)
    refused("x is of another dtype, the packed values are torch.bfloat16; they must be equal", x.double(), tensor)
    for shape in ((3, 131), (3, 133), (2, 3, 264), (0,), (1,) * 65):
        refused(f"{takes} x {re.escape(str(shape))[:150]}.*", torch.randn(shape).bfloat16(), tensor)
    refused(rf"{takes} x \(\)", torch.tensor(1.0).bfloat16(), tensor)
    refused(rf"{takes} x \(3, 132\) and a bias \(36,\)", x, tensor, bias[:36])
    refused(rf"{takes} x \(3, 132\) and a bias \(37, 1\)", x, tensor, bias.view(37, 1))


@pytest.mark.parametrize("wrong", ["random", "short", "cut off", "words", "strided", "another shape", "meta", "matrix"])
def test_a_tensor_that_is_no_packed_weight_is_refused(isa, wrong):
    w = weight("2:4", 37, 132, None, torch.bfloat16)
    tensor = w.pack()
    other = {
        "random": torch.randint(0, 256, (1000,), dtype=torch.uint8),
        "short": tensor[:100],
        "cut off": tensor[:-64],
        "words": torch.randn(1000),
        "strided": tensor[::2],
        "another shape": weight("2:4", 36, 132, None, torch.bfloat16).pack(),
        "meta": tensor.to("meta"),
        "matrix": tensor.view(-1, 1),
    }[wrong]
    with pytest.raises(BackendError, match="not a packed"):
        packed.unpack(other, *w.shape)
    if wrong not in ("meta", "matrix"):  # on the meta device the shape rule answers
        with pytest.raises(BackendError, match="not a packed"):
            packed.packed_linear(torch.randn(3, 132).bfloat16(), other, None, *w.shape[1:])


def test_a_layout_of_another_instruction_set_is_refused(use_isa):
    use_isa("avx512_bf16")
    w = weight("2:4", 37, 132, None, torch.bfloat16)
    tensors = {layout: w.pack(layout) for layout in ("bitmask", "pairs", "slots")}
    expected = torch.randn(3, 132).bfloat16()
    for isa in ("avx512", "avx2", "scalar"):
        use_isa(isa)
        for layout in ("pairs", "slots"):
            with pytest.raises(BackendError, match="made for an instruction set that is switched off"):
                packed.packed_linear(expected, tensors[layout], None, *w.shape[1:])
            with pytest.raises(BackendError, match="made for an instruction set that is switched off"):
                packed.unpack(tensors[layout], *w.shape)
        y = packed.packed_linear(expected, tensors["bitmask"], None, *w.shape[1:])  # every instruction set has this one
        assert_close(y, expected.double() @ w.dense.T, isa)


def test_a_pattern_that_the_weight_does_not_have_is_refused(use_isa):
    use_isa("avx512_bf16")
    tensor = weight("2:4", 37, 132, None, torch.bfloat16).pack("pairs")
    with pytest.raises(BackendError, match="is a packed .* unstructured one"):
        packed.unpack(tensor, "unstructured", 37, 132)


# ---- the layout a weight gets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, dtype, sparsity, layout",
    [
        ("2:4", torch.bfloat16, 0.5, "pairs"),
        ("unstructured", torch.bfloat16, 0.0, "bitmask"),
        ("unstructured", torch.bfloat16, 0.5, "bitmask"),
        ("4:8", torch.bfloat16, 0.5, "bitmask"),
        ("unstructured", torch.bfloat16, 0.75, "bitmask"),
        ("1:4", torch.bfloat16, 0.75, "bitmask"),
        ("unstructured", torch.bfloat16, SLOTS_FROM["decode"], "slots"),
        ("unstructured", torch.bfloat16, 1.0, "slots"),
        *itertools.product(("2:4", "1:4", "unstructured"), (torch.float16, torch.float32), (0.5, 0.9), ("bitmask",)),
    ],
)
def test_the_layout_of_a_weight(use_isa, pattern, dtype, sparsity, layout):
    use_isa("avx512_bf16")
    chosen, reason = choose_layout(pattern, dtype, sparsity)
    assert chosen == layout and reason


def test_a_packed_weight_has_the_chosen_layout(use_isa):
    use_isa("avx512_bf16")
    for pattern, sparsity, layout in (("2:4", None, "pairs"), ("1:6", None, "slots"), ("unstructured", 0.5, "bitmask")):
        assert packed.describe(weight(pattern, 37, 132, sparsity, torch.bfloat16).pack())["layout"] == layout


@pytest.mark.parametrize(
    "preference, layouts",
    [
        (None, ["bitmask", "bitmask", "slots"]),
        ("decode", ["bitmask", "bitmask", "slots"]),
        ("prefill", ["bitmask", "slots", "slots"]),
        ("memory", ["bitmask", "bitmask", "bitmask"]),
    ],
)
def test_the_user_chooses_between_layouts(use_isa, monkeypatch, preference, layouts):
    use_isa("avx512_bf16")
    if preference:
        monkeypatch.setenv(PREFER_VARIABLE, preference)
    sizes = []
    for sparsity, layout in zip((0.5, 0.75, 0.9), layouts, strict=True):
        tensor = weight("unstructured", 640, 1024, sparsity, torch.bfloat16).pack()
        assert packed.describe(tensor)["layout"] == layout
        sizes.append(tensor.nbytes / (2 * 640 * 1024))
    assert 0.56 < sizes[0] < 0.58 and (sizes[1] > 0.4 if layouts[1] == "slots" else sizes[1] < 0.33)
    assert choose_layout("2:4", torch.bfloat16, 0.5)[0] == "pairs"  # no larger than what is stored


def test_a_preference_that_does_not_exist(use_isa, monkeypatch):
    use_isa("avx512_bf16")
    monkeypatch.setenv(PREFER_VARIABLE, "both")
    with pytest.raises(UserError, match=r"SPARSE_RT_PREFER=both: allowed are decode \(default\), prefill, memory"):
        weight("unstructured", 16, 64, 0.5, torch.bfloat16).pack()


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_without_bf16_instructions_there_is_one_layout(use_isa, isa):
    use_isa(isa)
    for pattern, dtype, sparsity in itertools.product(("2:4", "unstructured"), DTYPES, (0.5, 0.9)):
        chosen, reason = choose_layout(pattern, dtype, sparsity)
        assert chosen == "bitmask" and isa in reason


# ---- the operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_the_operator_obeys_the_rules_of_torch(isa, pattern):
    w = weight(pattern, 7, 12, 0.75, torch.float32)
    x, bias = torch.randn(2, 3, 12, requires_grad=True), torch.randn(7, requires_grad=True)
    torch.library.opcheck(torch.ops.sparse_rt.packed_linear, (x, w.pack(), bias, *w.shape[1:]))
    torch.library.opcheck(torch.ops.sparse_rt.packed_linear, (x.detach(), w.pack(), None, *w.shape[1:]))
    dy = torch.randn(2, 3, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.sparse_rt.packed_linear_t, (dy, w.pack(), *w.shape[1:]))


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_gradients_in_float32(pattern):
    w = weight(pattern, 7, 12, 0.75, torch.float32)
    tensor = w.pack()
    x, bias = torch.randn(2, 3, 12, requires_grad=True), torch.randn(7, requires_grad=True)

    def function(x, bias):
        return packed.packed_linear(x, tensor, bias, *w.shape[1:])

    # the function is linear: a large step loses nothing, and what float32 rounds stays far below the tolerance
    assert torch.autograd.gradcheck(function, (x, bias), eps=0.5, atol=1e-4, rtol=1e-4)
    assert torch.autograd.gradgradcheck(function, (x, bias), eps=0.5, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern, sparsity", [("2:4", None), ("unstructured", 0.5), ("unstructured", 0.9)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_float64(pattern, sparsity, dtype):
    w = weight(pattern, 65, 132, sparsity, dtype)
    tensor, bias = w.pack(), torch.randn(65).to(dtype).requires_grad_()
    for shape in ((9, 132), (2, 5, 132), (132,)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        dy = torch.randn(*shape[:-1], 65).to(dtype)
        dx, db = torch.autograd.grad(packed.packed_linear(x, tensor, bias, *w.shape[1:]), (x, bias), dy)
        assert_close(dx, dy.double() @ w.dense)
        assert_close(db, dy.double().reshape(-1, 65).sum(0))


def test_no_gradient_is_made_that_nobody_asked_for(monkeypatch):
    w = weight("unstructured", 65, 132, 0.5, torch.float32)
    x, bias = torch.randn(3, 132), torch.randn(65, requires_grad=True)
    monkeypatch.setattr(packed, "unpack", lambda *_: pytest.fail("only dx needs the weight back"))
    packed.packed_linear(x, w.pack(), bias, *w.shape[1:]).sum().backward()
    assert torch.equal(bias.grad, torch.full((65,), 3.0))


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = []
    for pattern, m, n in (("2:4", 36, 24), ("unstructured", 24, 36)):
        w = weight(pattern, m, n, 0.75, dtype)
        layers += [SparseLinear(n, m, pattern, w.values.clone(), w.metadata, torch.randn(m).to(dtype)), nn.GELU()]
    return nn.Sequential(*layers).eval().requires_grad_(False)


@pytest.fixture
def dynamo():
    """What one test compiled, or gave up to compile, does not reach another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_model_compiles_without_graph_breaks(dynamo, dtype):
    eager = model(dtype)
    x = torch.randn(5, 24).to(dtype)
    with torch.no_grad():
        assert pack_weights(eager) == 2
        expected = eager(x)
        compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x[:2]), eager(x[:2]))  # another number of tokens
        assert all(layer.is_packed for layer in eager if isinstance(layer, SparseLinear))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(eager(x).sum(), x)[0])


def test_a_packed_model_compiles_with_inductor(dynamo):
    eager, x = model(), torch.randn(5, 24)
    pack_weights(eager)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(eager, fullgraph=True)(x), eager(x))


def test_compiled_code_follows_a_layer_that_changes_its_form(dynamo):
    eager, x = model(), torch.randn(5, 24)
    compiled = torch.compile(eager, backend="aot_eager")
    with torch.no_grad():
        expected = eager.train()(x)

        def same(function):
            torch.testing.assert_close(function(x), expected)
            return [layer.is_packed for layer in eager if isinstance(layer, SparseLinear)]

        eager.eval()
        assert same(compiled) == [False, False], "compiled code cannot pack on the way"
        assert same(eager) == [True, True]
        assert same(compiled) == [True, True]
        eager.train()
        assert same(compiled) == [False, False]
        eager.eval()
        assert same(eager) == [True, True]
        eager.training = eager[0].training = True  # not through train()
        assert same(compiled) == [False, True]


def test_training_compiles_whole_after_serving(dynamo):
    eager, x = model(), torch.randn(5, 24)
    with torch.no_grad():
        expected = eager(x)
    torch.testing.assert_close(torch.compile(eager.train(), fullgraph=True, backend="aot_eager")(x), expected)


def test_a_placeholder_is_never_multiplied_with():
    """PyTorch answers for an operator with one operand on the meta device, with whatever the memory holds."""
    w, x, bias = weight("2:4", 7, 12, None, torch.float32), torch.ones(1, 12), torch.ones(7)
    for values, metadata, b in (
        (w.values.to("meta"), w.metadata, bias),
        (w.values, w.metadata.to("meta"), None),
        (w.values, w.metadata, bias.to("meta")),
    ):
        with pytest.raises(RuntimeError, match="linear: the operands are on cpu and meta"):
            torch.ops.sparse_rt.linear(x, values, metadata, b, *w.shape)
    for tensor, b in ((w.pack().to("meta"), bias), (w.pack(), bias.to("meta"))):
        with pytest.raises(RuntimeError, match="packed_linear: the operands are on cpu and meta"):
            packed.packed_linear(x, tensor, b, *w.shape[1:])
        with torch.no_grad(), pytest.raises(BackendError, match="the operands are on cpu and meta"):
            packed.packed_linear(x, tensor, b, *w.shape[1:])


def test_the_choice_of_a_backend_explains_itself():
    choice = backends.explain(backends.Call("packed_linear", "2:4", 8, 8, 1, torch.float32, "cpu"))
    assert choice.backend.name == "native"
