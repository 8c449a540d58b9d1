"""The native kernels move bits: every instruction set equals the format's own compress and decompress exactly, touches
nothing outside its buffers, and the operations built on it agree with float64."""

import ctypes
import functools
import threading

import pytest
import torch

from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.kernels import backends, scratch
from sparse_rt.kernels.native import library
from sparse_rt.kernels.native import ops as native

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# no multiple of 8, 32 or 64 columns; fewer columns than a vector; rows for several threads; more than 16 MiB at the end
SHAPES = ((1, 1), (3, 7), (5, 12), (17, 33), (33, 60), (64, 100), (70, 1000), (129, 4096))


@pytest.fixture(params=[1, 3], ids=["serial", "threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@functools.cache
def random_case(m, n, pattern, density, dtype):
    """(values, metadata, dense), made once: any bit patterns (NaN, Inf, -0.0, stored zeros), seen as ``dtype``."""
    fmt = get_format(pattern)
    if pattern == "unstructured":
        mask = torch.rand(m, n) < density
        mask[m // 2] = False  # an empty row
    else:
        mask = fmt.mask_from_scores(torch.rand(m, n))
    integer = BITS[dtype]
    dense = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, (m, n), dtype=integer)
    dense[torch.rand(m, n) < 0.1] = 0
    dense = torch.where(mask, dense, 0)
    values, metadata = fmt.compress(dense, mask)
    return values.view(dtype), metadata, dense.view(dtype)


def same_bits(actual, expected):
    integer = BITS[expected.dtype]
    return actual.dtype == expected.dtype and torch.equal(actual.view(integer), expected.view(integer))


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "unstructured"])
def test_decompress_and_gather_equal_the_format_bit_for_bit(isa, threads, pattern, dtype):
    for m, n in SHAPES:
        if get_format(pattern).refuse_shape(m, n):
            continue
        for density in (0.0, 0.3, 1.0) if pattern == "unstructured" else (None,):
            values, metadata, dense = random_case(m, n, pattern, density, dtype)
            case = f"{isa} {pattern} ({m}, {n}) density {density}"
            assert same_bits(native.decompress(values, metadata, pattern, m, n), dense), case
            assert same_bits(native.gather(dense, metadata, pattern, m, n, values), values), case


@pytest.mark.parametrize("n", [4096, 4100], ids=["aligned rows", "unaligned rows"])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_results_larger_than_the_caches(isa, threads, pattern, n):
    m = (17 << 20) // (2 * 4096)
    values, metadata, dense = random_case(m, n, pattern, 0.5, torch.bfloat16)
    assert same_bits(native.decompress(values, metadata, pattern, m, n), dense)
    assert same_bits(native.gather(dense, metadata, pattern, m, n, values), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_pointers_need_no_alignment(isa, pattern, dtype):
    m, n = 9, 300
    values, metadata, dense = random_case(m, n, pattern, 0.6, dtype)

    def shifted(tensor):
        return torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape)

    if values.numel():
        out = shifted(torch.zeros_like(dense))
        assert native.expand_into(out, shifted(values), shifted(metadata), pattern) == values.numel()
        assert same_bits(out, dense)
    into = shifted(torch.zeros_like(values))
    assert native.gather_into(into.view(-1), shifted(dense), shifted(metadata), pattern) == values.numel()
    assert same_bits(into, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_no_buffer_is_read_or_written_past_its_end(isa, guarded, pattern, dtype):
    """Values, metadata and result each end at a protected page: one byte too far ends the process."""
    handle = library.load().handle
    size = torch.empty((), dtype=dtype).element_size()
    for m, n, density in ((1, 4, 1.0), (3, 12, 0.5), (7, 72, 0.05), (5, 100, 1.0), (40, 516, 0.5), (33, 2048, 0.97)):
        values, metadata, dense = random_case(m, n, pattern, density, dtype)
        room = [] if pattern == "2:4" else [values.numel()]
        expand = handle.srt_expand_24 if pattern == "2:4" else handle.srt_expand_bitmask
        gather = handle.srt_gather_24 if pattern == "2:4" else handle.srt_gather_bitmask
        for threads in (1, 2):
            out, packed = guarded(torch.ones_like(dense)), guarded(torch.ones_like(values))
            tail = m, n, size, threads
            assert expand(guarded(values), *room, guarded(metadata), out, *tail) == values.numel()
            assert ctypes.string_at(out, dense.nbytes) == bytes_of(dense)
            assert gather(guarded(dense), guarded(metadata), packed, *room, *tail) == values.numel()
            assert ctypes.string_at(packed, values.nbytes) == bytes_of(values)


def bytes_of(tensor):
    return ctypes.string_at(tensor.contiguous().data_ptr(), tensor.nbytes)


def test_too_few_or_too_many_values_are_refused_without_leaving_the_buffers(isa, threads, guarded):
    m, n = 600, 256
    values, metadata, dense = random_case(m, n, "unstructured", 0.5, torch.float32)
    for wrong in (values[:-1], torch.cat((values, values[:1])), values[:0]):
        with pytest.raises(FormatError, match=rf"marks \d+ kept weights, there are {wrong.numel()} values"):
            native.decompress(wrong, metadata, "unstructured", m, n)
        with pytest.raises(FormatError, match="marks"):
            native.gather(dense, metadata, "unstructured", m, n, wrong)
    handle = library.load().handle
    full, half = torch.full_like(metadata, 255), values[: m * n // 4]
    tail = m, n, 4, threads
    assert handle.srt_expand_bitmask(guarded(half), half.numel(), full.data_ptr(), guarded(dense), *tail) == m * n
    assert handle.srt_gather_bitmask(guarded(dense), full.data_ptr(), guarded(half), half.numel(), *tail) == m * n


def test_padding_bits_and_nonsense_nibbles_stay_harmless(isa):
    values, metadata, dense = random_case(11, 61, "unstructured", 0.5, torch.bfloat16)
    metadata = metadata | torch.tensor([0] * 7 + [0b11100000], dtype=torch.uint8)
    assert same_bits(native.decompress(values, metadata, "unstructured", 11, 61), dense)
    nibbles = torch.randint(0, 256, (11, 8), dtype=torch.uint8)  # first >= second in most groups
    out = native.decompress(torch.ones(11, 30), nibbles, "2:4", 11, 60)
    assert set(out.unique().tolist()) <= {0.0, 1.0} and out.shape == (11, 60)


def test_an_empty_weight_is_possible():
    for m, n in ((0, 8), (4, 0)):
        out = native.decompress(torch.empty(0), torch.empty(m, n // 8, dtype=torch.uint8), "unstructured", m, n)
        assert out.shape == (m, n)


def test_wrong_metadata_dtype_or_device_is_an_error_that_names_it():
    values, metadata, _ = random_case(4, 16, "unstructured", 0.5, torch.float32)
    with pytest.raises(FormatError, match=r"is uint8 \(4, 2\), got uint8 \(3, 2\)"):
        native.decompress(values, metadata[:3], "unstructured", 4, 16)
    with pytest.raises(UserError, match="float64"):
        native.decompress(values.double(), metadata, "unstructured", 4, 16)
    with pytest.raises(UserError, match="every tensor on the CPU, got meta"):
        native.decompress(values.to("meta"), metadata, "unstructured", 4, 16)


def test_what_the_native_backend_refuses_and_why():
    def refusal(pattern, dtype, device):
        call = backends.Call("linear", pattern, 8, 8, 1, dtype, device)
        return dict(backends.explain(call).refused).get("native")

    assert refusal("2:4", torch.bfloat16, "cpu") is None
    assert "the tensors are on cuda" in refusal("2:4", torch.bfloat16, "cuda")
    assert "not float64" in refusal("2:4", torch.float64, "cpu")
    assert "unknown pattern" in refusal("spiral", torch.float32, "cpu")


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("tokens", [1, 200])
def test_few_tokens_in_row_blocks_equal_the_dense_product(monkeypatch, pattern, dtype, tokens):
    monkeypatch.setattr(native, "BLOCK_BYTES", 7 * 72 * dtype.itemsize)  # 7 rows: 12 blocks, the last one short
    monkeypatch.setattr(native, "BLOCK_BYTES_PER_THREAD", 0)
    m, n = 80, 72
    fmt = get_format(pattern)
    weight = torch.randn(m, n).to(dtype)
    mask = fmt.mask_from_scores(weight.float().abs(), 0.6)
    dense, (values, metadata) = torch.where(mask, weight, 0), fmt.compress(weight, mask)
    x, bias = torch.randn(tokens, n).to(dtype), torch.randn(m).to(dtype)
    epsilon = 4 * torch.finfo(dtype).eps

    def close(actual, expected):
        return actual.dtype == dtype and (actual.double() - expected).abs().max() <= epsilon * expected.abs().max()

    y = native.linear(x, values, metadata, bias, pattern, m, n)
    assert close(y, x.double() @ dense.double().T + bias.double())
    assert torch.equal(native.linear(x.view(tokens, 1, n), values, metadata, bias, pattern, m, n).view(tokens, m), y)
    dy = torch.randn(tokens, m).to(dtype)
    assert close(native.linear_t(dy, values, metadata, pattern, m, n), dy.double() @ dense.double())
    grad = native.values_grad(dy, x, metadata, pattern, m, n, values)
    assert close(grad.flatten(), (dy.double().T @ x.double())[mask])
    with pytest.raises(FormatError, match="marks"):
        native.linear(x, values.flatten()[:-1], metadata, bias, pattern, m, n)


def test_a_long_sum_of_bfloat16_products_is_not_rounded_on_the_way():
    """1 + 4095 times 1/256 in bfloat16 steps would stay at 1 (or 2); float32 accumulation gives 16.996."""
    tokens, m, n = 4096, 16, 32
    _, metadata, _ = random_case(m, n, "2:4", None, torch.bfloat16)
    dy, x = torch.full((tokens, m), 1 / 256).bfloat16(), torch.ones(tokens, n).bfloat16()
    dy[0] = 1
    for dtype, expected in ((torch.bfloat16, 17.0), (torch.float32, 1 + 4095 / 256)):
        grad = native.values_grad(dy, x, metadata, "2:4", m, n, torch.empty(m, n // 2, dtype=dtype))
        assert grad.dtype == dtype and (grad == expected).all()


def test_threads_do_not_share_scratch_and_inference_mode_does_not_taint_it():
    values, metadata, _ = random_case(96, 256, "unstructured", 0.5, torch.bfloat16)
    cases = [(torch.randn(values.shape).bfloat16(), metadata) for _ in range(4)]
    x = torch.randn(64, 256).bfloat16()

    def run(case):
        return native.linear(x, *case, None, "unstructured", 96, 256)

    with torch.inference_mode():
        expected = [run(case) for case in cases]
    wrong = []

    def repeat(index):
        for _ in range(30):
            if not torch.equal(run(cases[index]), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=repeat, args=(index,)) for index in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_scratch_is_one_growing_buffer_for_every_layer():
    scratch.release()
    small = scratch.buffer("test", (4, 8), torch.float32)
    assert scratch.buffer("test", (2, 8), torch.float32).data_ptr() == small.data_ptr()
    large = scratch.buffer("test", (64, 8), torch.float32)
    assert large.shape == (64, 8) and scratch.nbytes() == 64 * 8 * 4
    assert scratch.buffer("test", (4, 8), torch.float32).data_ptr() == large.data_ptr()
    scratch.buffer("test", (4, 8), torch.bfloat16)
    assert scratch.nbytes() == 64 * 8 * 4 + 64
    scratch.release()
    assert scratch.nbytes() == 0
