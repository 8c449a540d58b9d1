"""Kernels are used where they were measured to be faster on this GPU, and nowhere else; the words that change it."""

import json

import pytest
import torch

import packed_cases

pytest.importorskip("triton")
from sparse_rt.errors import UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels import columns, positions, reference
from sparse_rt.kernels import packed as front
from sparse_rt.kernels.triton import configs, cslt, d4, decompress, dispatch, gradient, layouts, mma_sp, ops, packed
from sparse_rt.kernels.triton import linear as linear_kernels

CASES = (("2:4", 33, 132, None), ("4:8", 17, 64, None), ("unstructured", 33, 130, 0.75), ("unstructured", 5, 9, 1.0))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = {
    "d4": [
        {"pattern": "unstructured", "sparsity": 0.74, "weights": 1000, "tokens": 8},
        {"pattern": "unstructured", "sparsity": 0.49, "weights": 1000, "tokens": 4},
    ],
    "mma_sp": [{"pattern": "2:4", "tokens": 16}],
    "cslt": [{"pattern": "2:4", "from": 512, "tokens": 8192}],
}


@pytest.fixture(autouse=True)
def _measured(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE)
    _forget()
    yield
    _forget()


def _forget():
    for known in (dispatch._limits, layouts._choose, front._known_refusal, dispatch.read, dispatch.parse):
        known.cache_clear()


@pytest.fixture
def table(monkeypatch):
    """Pretend that the current GPU, and the CPU of the interpreter, has this table."""

    def use(rows, **more):
        content = {"gpu": "GPU X", "dispatch": rows, **more}
        real = configs.read
        monkeypatch.setattr(configs, "read", lambda name: content if name == "gpu_x" else real(name))
        monkeypatch.setattr(configs, "gpu_name", lambda device=None: "gpu_x")
        _forget()

    return use


def tokens(kernel, pattern="2:4", sparsity=0.5, dtype=BF16, m=64, n=64):
    found = dispatch.limits(kernel, pattern, m, n, sparsity, dtype)
    return None if found.never else tuple(found[:2])


# ---- an unmeasured GPU ----------------------------------------------------------------------------------------------


def test_the_default_says_zero_for_every_kernel():
    default = configs.read(configs.DEFAULT)["dispatch"]
    assert default == {kernel: [{"tokens": 0}] for kernel in dispatch.KERNELS}
    for kernel in dispatch.KERNELS:
        for pattern, dtype in (("2:4", BF16), ("unstructured", FP16), ("4:8", FP32)):
            assert tokens(kernel, pattern, dtype=dtype, m=1 << 20, n=1 << 20) is None
    assert dispatch.measured() is None


@pytest.mark.parametrize("name", configs.files())
def test_shipped_tables_are_tables(name):
    assert dispatch.problems(configs.read(name)) == []


def forbidden(monkeypatch):
    for module, name in (
        (linear_kernels, "linear"),
        (linear_kernels, "linear_t"),
        (gradient, "values_grad"),
        (d4, "linear"),
        (mma_sp, "linear"),
        (cslt, "linear"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was used"))


@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_unmeasured_gpu_runs_every_product_through_the_dense_weight(device, case, dtype, monkeypatch):
    forbidden(monkeypatch)
    w = packed_cases.weight(*case, dtype)
    values, metadata, dense = w.values.to(device), w.metadata.to(device), w.dense.to(device)
    bias = torch.randn(w.m).to(device, dtype)
    made = [packed.pack(values, metadata, *w.shape, layout) for layout in ("d4", None)]
    for count in (0, 1, 17):
        x, dy = torch.randn(count, w.n).to(device, dtype), torch.randn(count, w.m).to(device, dtype)
        expected = x.double() @ dense.T + bias.double()
        packed_cases.assert_close(ops.linear(x, values, metadata, bias, *w.shape), expected, count)
        for tensor in made:
            packed_cases.assert_close(packed.linear(x, tensor, bias, w.m, w.n), expected, count)
        packed_cases.assert_close(ops.linear_t(dy, values, metadata, *w.shape), dy.double() @ dense, count)


@pytest.mark.parametrize("given, wanted", [(BF16, BF16), (BF16, FP32), (FP32, FP32), (FP32, BF16)], ids=str)
@pytest.mark.parametrize("case", [*CASES, ("unstructured", 300, 40, 0.5), ("2:4", 300, 40, None)], ids=str)
def test_gradients_are_gathered_from_blocks_of_a_dense_one(device, case, given, wanted, monkeypatch):
    forbidden(monkeypatch)
    monkeypatch.setattr(ops, "GRADIENT_ELEMENTS", 1)  # blocks of 128 rows
    w = packed_cases.weight(*case, FP32)
    like, metadata = w.values.to(device, wanted), w.metadata.to(device)
    for count in (0, 5):
        x, dy = torch.randn(count, w.n).to(device, given), torch.randn(count, w.m).to(device, given)
        found = ops.values_grad(dy, x, metadata, *w.shape, like)
        assert found.dtype == wanted and found.shape == like.shape
        exact = reference.values_grad(dy.double().cpu(), x.double().cpu(), w.metadata, *w.shape, w.values.double())
        exact = exact.to(device)
        if BF16 not in (given, wanted) or wanted == FP32:
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
        else:  # rounded once
            assert (found.double() - exact).norm() <= 3e-3 * exact.norm()


def test_what_seft_and_dcft_call_goes_the_plain_way_on_an_unmeasured_gpu(device, monkeypatch):
    monkeypatch.setenv("SPARSE_RT_BACKEND", "triton")
    dy, x, scale = (torch.randn(shape, device=device).to(BF16) for shape in ((9, 24), (9, 36), (36,)))

    def reasons():
        return positions.refusal(dy, x, "2:4", 24, 36), columns.refusal(x, scale.float())

    assert all("has not been measured on this GPU" in reason for reason in reasons())
    chosen = torch.tensor([0, 5, 700], dtype=torch.int32, device=device)
    found = positions.gradient(dy, x, positions.Chosen(chosen, "2:4", 24, 36))
    expected = (dy.double().T @ x.double()).flatten()[chosen.long()]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    with dispatch.forced("positions_grad", "scale_columns"):
        assert reasons() == (None, None)


def test_a_layer_on_an_unmeasured_gpu_stays_as_it_is_stored(monkeypatch):
    monkeypatch.setattr(ops, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for pattern, sparsity in (("2:4", 0.5), ("unstructured", 0.9)):
        shape = pattern, 64, 64, BF16, "cuda"
        assert front.refusal(*shape) is None, "it can be packed"
        assert "has not been measured on this GPU (SPARSE_RT_GPU_KERNELS=all" in front.refusal(*shape, sparsity)
        monkeypatch.setenv(dispatch.VARIABLE, "all")
        assert front.refusal(*shape, sparsity) is None
        monkeypatch.setenv(dispatch.VARIABLE, "none")
        assert front.refusal(*shape, sparsity) == "SPARSE_RT_GPU_KERNELS=none"
        monkeypatch.delenv(dispatch.VARIABLE)


# ---- a measured GPU -------------------------------------------------------------------------------------------------


def test_the_first_row_that_fits_decides(table):
    table(H200, measured={"date": "2026-12-01"})
    assert dispatch.measured() == {"gpu": "GPU X", "date": "2026-12-01"}
    assert [tokens("d4", "unstructured", s) for s in (0.48, 0.5, 0.73, 0.75, 0.99)] == [
        *(None, (1, 4), (1, 4)),
        *((1, 8), (1, 8)),
    ]
    assert tokens("d4", "unstructured", 0.9, m=10, n=10) is None, "smaller than what was measured"
    assert tokens("d4", "4:8", 0.5) == (1, 4), "the same bitmask and kernel as an unstructured weight"
    assert tokens("d4", "unstructured", 0.9, FP32) is None and tokens("d4", "unstructured", 0.9, FP16) == (1, 8)
    assert tokens("cslt") == (512, 8192) and tokens("cslt", "4:8") is None
    assert tokens("linear") is None, "no row: what the default says"
    assert "was not measured to be faster" in dispatch.refusal("linear")


def test_words_change_it(table, monkeypatch):
    table(H200)

    def found(words):
        monkeypatch.setenv(dispatch.VARIABLE, words)
        return [tokens(kernel) for kernel in ("mma_sp", "linear", "cslt")]

    assert found("measured") == found("") == [(1, 16), None, (512, 8192)]
    assert found("all") == [(1, 16), (1, 64), (512, 8192)], "measured rows stay, the others are added"
    assert found("none") == [None] * 3
    assert found("measured,-cslt") == [(1, 16), None, None]
    assert found("none, linear") == [None, (1, 64), None]
    assert found("all,-mma_sp,mma_sp") == found("all")
    with pytest.raises(UserError, match="'fast' is not known; allowed are measured, all, none"):
        found("all,fast")


def test_a_table_of_the_user(tmp_path, monkeypatch):
    file = tmp_path / "gpu.json"
    monkeypatch.setenv(dispatch.VARIABLE, str(file))
    with pytest.raises(UserError, match="cannot be read as JSON"):
        tokens("d4")
    file.write_text(json.dumps({"gpu": "Y", "dispatch": {"linear": [{"tokens": None}]}, "measured": {"torch": "2.11"}}))
    assert tokens("linear") == (1, None) and tokens("d4") is None
    assert dispatch.measured() == {"gpu": "Y", "torch": "2.11"}


@pytest.mark.parametrize(
    "rows, message",
    [
        (None, 'no "dispatch"'),
        ({"d5": []}, "unknown kernel 'd5'"),
        ({"d4": [{"pattern": "2:4"}]}, 'needs "tokens"'),
        ({"d4": [{"tokens": 4, "sparse": 1}]}, "unknown 'sparse'"),
        ({"d4": [{"tokens": 4, "weights": "many"}]}, "'weights' of .* has the wrong type"),
        ({"cslt": [{"tokens": 64, "replaces": True}]}, "serves every number of tokens"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, rows, message):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({} if rows is None else {"dispatch": rows}))
    with pytest.raises(UserError, match=message):
        dispatch.read(str(file))


def test_measurements_force_one_kernel(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "all")
    with dispatch.forced("linear_t"):
        assert [tokens(kernel) for kernel in dispatch.KERNELS if tokens(kernel)] == [(1, None)]
        with dispatch.forced():
            assert not any(tokens(kernel) for kernel in dispatch.KERNELS)
    assert tokens("linear") == (1, 64)
    with pytest.raises(UserError, match="unknown GPU kernels"), dispatch.forced("d5"):
        pass


def test_a_measured_kernel_is_used_up_to_its_limit(device, table, monkeypatch):
    table({"d4": [{"tokens": 2}], "linear": [{"tokens": 1}], "linear_t": [{"from": 2, "tokens": None}]})
    w = packed_cases.weight("unstructured", 33, 130, 0.75, BF16)
    values, metadata = w.values.to(device), w.metadata.to(device)
    tensor, calls = packed.pack(values, metadata, *w.shape), []
    for module, name in ((linear_kernels, "linear"), (linear_kernels, "linear_t"), (d4, "linear")):
        real = getattr(module, name)
        said = f"{module.__name__.rpartition('.')[2]}.{name}"
        monkeypatch.setattr(module, name, lambda *a, real=real, said=said: (calls.append(said), real(*a))[1])
    for count in (1, 2, 3):
        x, dy = torch.randn(count, w.n).to(device, BF16), torch.randn(count, w.m).to(device, BF16)
        wanted = x.double() @ w.dense.to(device).T
        packed_cases.assert_close(ops.linear(x, values, metadata, None, *w.shape), wanted)
        packed_cases.assert_close(packed.linear(x, tensor, None, w.m, w.n), wanted)
        packed_cases.assert_close(ops.linear_t(dy, values, metadata, *w.shape), dy.double() @ w.dense.to(device))
    assert calls == ["linear.linear", "d4.linear", "d4.linear", "linear.linear_t", "linear.linear_t"]


# ---- layouts and cuSPARSELt -----------------------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch):
    """What cuSPARSELt would do, on any device: its form holds values and metadata, its product is the dense one."""
    swept = []

    def compress(values, metadata, m, n):
        return torch.cat([values.reshape(-1), metadata.reshape(-1).view(values.dtype)]).view(m, -1)

    def linear(x, blob, bias, m, n):
        flat = blob.reshape(-1)
        assert flat.data_ptr() % 16 == 0
        values, metadata = flat[: m * n // 2].view(m, -1), flat[m * n // 2 :].view(torch.uint8).view(m, -1)
        dense = get_format("2:4").decompress(values, metadata, m, n)
        return torch.nn.functional.linear(x.double(), dense.double(), bias and bias.double()).to(x.dtype)

    monkeypatch.setattr(cslt, "refusal", lambda dtype, m, n: None)
    monkeypatch.setattr(cslt, "compress", compress)
    monkeypatch.setattr(cslt, "linear", linear)
    monkeypatch.setattr(cslt, "sweep", lambda blob, m, n, tokens: swept.append(tokens))
    return swept


def test_layouts_follow_the_table(table, library):
    def chosen(rows, pattern="2:4", sparsity=0.5, dtype=BF16):
        table(rows)
        return layouts.choose_layout(pattern, dtype, sparsity, (64, 64))[0]

    beside, alone = {"tokens": 8192, "from": 512}, {"tokens": None, "replaces": True}
    assert chosen({}) is None and chosen({}, "unstructured", 0.9) is None
    assert chosen({"mma_sp": [{"tokens": 16}]}) == "mma_sp"
    assert chosen({"mma_sp": [{"tokens": 16}], "cslt": [beside]}) == "mma_sp+cslt"
    assert chosen({"cslt": [beside]}) == "mma_sp+cslt", "the form that can be given back"
    assert chosen({"mma_sp": [{"tokens": 16}], "cslt": [alone]}) == "cslt"
    assert chosen({"mma_sp": [{"tokens": 16}]}, dtype=FP32) is None
    assert chosen({"d4": [{"tokens": 8}]}) == "d4" == chosen({"d4": [{"tokens": 8}]}, "unstructured", 0.9)
    assert chosen({"mma_sp": [{"tokens": 16}], "cslt": [beside]}, "unstructured", 0.9) is None


def test_a_gpu_without_the_library_says_so(table, monkeypatch):
    table({"mma_sp": [{"tokens": 16}], "cslt": [{"tokens": 8192, "from": 512}]})
    monkeypatch.setattr(cslt, "unavailable_reason", lambda: "torch was built without cuSPARSELt")
    layout, reason = layouts.choose_layout("2:4", BF16, 0.5, (64, 64))
    assert layout == "mma_sp" and reason == "sparse tensor cores for 1 to 16 tokens; torch was built without cuSPARSELt"


@pytest.mark.parametrize("layout, bytes_a_weight", [("cslt", 1.25), ("mma_sp+cslt", 2.25)])
def test_the_form_of_the_library(device, table, library, layout, bytes_a_weight, monkeypatch):
    alone = layout == "cslt"
    row = {"tokens": None, "replaces": True} if alone else {"from": 512, "tokens": 8192}
    table({"mma_sp": [{"tokens": 16}], "cslt": [row]})
    w = packed_cases.weight("2:4", 64, 512, None, BF16)
    tensor = packed.pack(w.values.to(device), w.metadata.to(device), *w.shape)
    assert packed.describe(tensor)["layout"] == layout
    assert library == ([16, 512, 2048, 8192] if alone else [512, 2048, 8192]), "algorithms are timed at load"
    assert tensor.nbytes == pytest.approx(bytes_a_weight * w.m * w.n, abs=200)
    back = packed.unpack(tensor, "2:4", w.m, w.n)
    assert torch.equal(back[0].cpu(), w.values) and torch.equal(back[1].cpu(), w.metadata)
    used, real = [], cslt.linear
    monkeypatch.setattr(cslt, "linear", lambda x, *rest: (used.append(len(x)), real(x, *rest))[1])
    dense = w.dense.to(device)
    for same in (tensor, tensor.clone()):
        for count in (1, 17, 512, 600):
            x = torch.randn(count, w.n).to(device, BF16)
            packed_cases.assert_close(packed.linear(x, same, None, w.m, w.n), x.double() @ dense.T)
    assert used == ([1, 17, 512, 600] if alone else [512, 600]) * 2
    monkeypatch.setattr(packed, "_known", lambda tensor: None)
    monkeypatch.setattr(packed, "_capturing", lambda tensor: True)  # the size alone says where everything is
    x, dy = torch.randn(512, w.n).to(device, BF16), torch.randn(3, w.m).to(device, BF16)
    packed_cases.assert_close(packed.linear(x, tensor, None, w.m, w.n), x.double() @ dense.T)
    packed_cases.assert_close(packed.linear_t(dy, tensor, w.m, w.n), dy.double() @ dense)


def test_a_weight_that_the_library_would_not_give_back_keeps_its_fragments(device, table, library):
    table({"cslt": [{"tokens": None, "replaces": True}]})
    w = packed_cases.weight("2:4", 32, 64, None, BF16)
    values = w.values.clone()
    values[3, 5] = -0.0
    tensor = packed.pack(values.to(device), w.metadata.to(device), *w.shape)
    assert packed.describe(tensor)["layout"] == "mma_sp"
    assert torch.equal(packed.unpack(tensor, *w.shape)[0].view(torch.int16).cpu(), values.view(torch.int16))


def test_an_unswept_number_of_tokens_takes_the_nearest_algorithm(monkeypatch):
    key = cslt._key(torch.device("cpu"), BF16, 64, 64)
    monkeypatch.setitem(cslt._algorithms, key, {512: 3, 8192: 7})
    found = [cslt._algorithm(torch.device("cpu"), BF16, 64, 64, count) for count in (1, 512, 700, 2000, 5000, 20000)]
    assert found == [3, 3, 3, 3, 7, 7]
    assert cslt._algorithm(torch.device("cpu"), BF16, 64, 128, 512) == 0


def test_gathering_rows_puts_them_in_their_places(device):
    for case in CASES:
        w = packed_cases.weight(*case, FP32)
        values = torch.full(w.values.shape, float("nan"), device=device)
        dense = w.dense.float().to(device)
        for start in range(0, w.m, 2):
            rows = dense[start : start + 2]
            decompress.gather_rows(rows, w.metadata.to(device), w.pattern, w.m, w.n, start, values)
        assert torch.equal(values.cpu(), w.values)
