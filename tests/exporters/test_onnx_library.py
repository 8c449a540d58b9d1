"""The operators as a library in the real ONNX Runtime: against float64, on every instruction set, with bad files."""

import ctypes
import subprocess
import sys
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_models import (
    ISAS,
    TYPES,
    counted,
    native,
    operator_model,
    operator_tensors,
    random_weight,
    relative_error,
    save,
    session,
)

from packed_cases import patchy
from sparse_rt.errors import BackendError, UserError
from sparse_rt.exporters.onnx import engine, library
from sparse_rt.exporters.onnx.stored import decode

PATTERNS = ("unstructured", "2:4", "4:8", "dense")
# One column, one byte, whole words of 64, a column less and one more, longer rests, more than one panel of 4096
# columns; one row, 16 and a rest.
SHAPES = {
    "unstructured": [(1, 1), (5, 7), (16, 8), (9, 63), (33, 64), (9, 65), (17, 100), (40, 600), (20, 1024), (18, 4700)],
    "2:4": [(1, 4), (7, 12), (33, 64), (17, 100), (40, 600), (20, 1024), (18, 4700)],
    "4:8": [(3, 8), (33, 64), (40, 600)],
    "dense": [(1, 1), (5, 7), (9, 63), (33, 64), (9, 65), (17, 100), (40, 600), (18, 4700)],
}
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 97)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("values", TYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_products_equal_float64(use_isa, isa, values, pattern):
    use_isa(isa)
    for m, n in SHAPES[pattern]:
        weight = random_weight(m, n, pattern, dtype=values)
        if pattern == "unstructured":
            weight[m // 2] = 0.0 if m > 1 else 1.0  # an empty row
        runtime = native(operator_model(weight, pattern, None))
        for tokens in TOKENS:
            x = torch.randn(tokens, n)
            (y,), calls = counted(lambda x=x, runtime=runtime: runtime.run(None, {"x": x.numpy()}))
            assert calls == 1
            assert relative_error(y, x.double() @ weight.double().T) <= TOLERANCE[torch.float32], (m, n, tokens)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("values", TYPES, ids=str)
@pytest.mark.parametrize("activations", TYPES, ids=str)
def test_every_pair_of_dtypes(use_isa, isa, values, activations):
    """A registered operator hides the function for types that it lacks, so it must not lack any."""
    use_isa(isa)
    weight = random_weight(40, 72, "unstructured", dtype=values)
    runtime = native(operator_model(weight, "unstructured", None, TYPES[activations], cast=True))
    for tokens in (1, 3, 9):
        x = torch.randn(tokens, 72).to(activations)
        (y,) = runtime.run(None, {"x": x.float().numpy()})
        assert relative_error(y, x.double() @ weight.double().T) <= TOLERANCE[activations]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_number_of_dimensions(pattern, lead):
    weight = random_weight(24, 64, pattern)
    runtime = native(operator_model(weight, pattern, "folding", rank=len(lead) + 1))
    x = torch.randn(*lead, 64)
    (y,) = runtime.run(None, {"x": x.numpy()})
    assert y.shape == (*lead, 24)
    assert np.allclose(y, x @ weight.T, atol=1e-5)


def test_a_weight_without_any_value():
    weight = torch.zeros(20, 64)
    tensors = operator_tensors(weight, "unstructured") | {"values": torch.zeros(1)}
    (y,) = native(operator_model(weight, "unstructured", None, tensors=tensors)).run(
        None, {"x": np.ones((2, 64), "f4")}
    )
    assert not y.any()


@pytest.mark.parametrize("values", TYPES, ids=str)
def test_full_columns_in_a_sparse_weight(values):
    """Rows of 90 % zeros are read by half vectors, which these columns do not fit into."""
    w = patchy(40, 1000, values)
    runtime = native(operator_model(w.dense.to(values), "unstructured", None))
    for tokens in (1, 2, 4):
        x = torch.randn(tokens, 1000)
        (y,) = runtime.run(None, {"x": x.numpy()})
        assert relative_error(y, x.double() @ w.dense.T) <= TOLERANCE[torch.float32]


def test_special_values_survive():
    """An infinity and a stored -0.0 are values like any other, and a NaN stays in its row."""
    weight, tensors = special_values()
    model = operator_model(weight, "unstructured", None, tensors=tensors)
    (y,), calls = counted(lambda: native(model).run(None, {"x": np.eye(64, dtype="f4")}))
    assert calls == 1 and y[1, 0] == np.inf and np.isnan(y[2, 1]) and y[3, 2] == 1.0
    assert np.isfinite(y[:, 2]).all() and y[9, 2] == 0.0


def test_special_values_are_decompressed(tmp_path):
    """To the bit by the check of an export; ONNX Runtime's Where makes 0.0 of a -0.0 when it folds the body."""
    weight, tensors = special_values()
    names = {"weight_values": "values", "weight_bitmask": "mask", "row_offsets": "row_offsets"}
    found = decode("unstructured", 3, 64, {part: tensors[name].numpy() for part, name in names.items()})
    assert np.array_equal(found.view(np.int32), weight.view(torch.int32).numpy()) and np.signbit(found[2, 9])
    model = operator_model(weight, "unstructured", "folding", tensors=tensors)
    session(model, optimized_model_filepath=str(tmp_path / "folded.onnx"))
    graph = onnx.load(str(tmp_path / "folded.onnx")).graph
    (folded,) = (tensor for tensor in graph.initializer if list(tensor.dims) == [64, 3])
    assert np.array_equal(onnx.numpy_helper.to_array(folded).T, weight.numpy(), equal_nan=True)


def special_values():
    """A weight [3, 64] and its tensors: in row 0 an infinity, in row 1 a NaN, in row 2 a 1 and a stored -0.0."""
    weight = torch.zeros(3, 64)
    weight[0, 1], weight[1, 2], weight[2, 3], weight[2, 9] = float("inf"), float("nan"), 1.0, 5.0
    tensors = operator_tensors(weight, "unstructured")
    tensors["values"][-1] = weight[2, 9] = -0.0  # the mask keeps it: nobody looks whether a value is 0
    return weight, tensors


@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(use_isa, isa):
    use_isa(isa)
    weight = random_weight(300, 520, "unstructured", dtype=torch.bfloat16)
    for tokens in (1, 4, 40, 200):
        feed = {"x": torch.randn(tokens, 520).numpy()}
        found = [
            native(operator_model(weight, "unstructured", None), threads).run(None, feed)[0] for threads in (1, 2, 3)
        ]
        assert all(np.array_equal(found[0], other) for other in found[1:])


def test_the_library_is_used_where_it_is_registered_and_the_function_elsewhere():
    weight = random_weight(24, 64, "2:4")
    model = operator_model(weight, "2:4", "folding")
    feed = {"x": np.ones((2, 64), np.float32)}
    for level in onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL:
        with_library = native(model, graph_optimization_level=level)
        without = session(model, graph_optimization_level=level)
        (y,), calls = counted(lambda runtime=with_library: runtime.run(None, feed))
        (other,), none = counted(lambda runtime=without: runtime.run(None, feed))
        assert (calls, none) == (1, 0)
        assert np.allclose(y, other, atol=1e-5)
        assert engine.which_kernel(with_library) == f"native ({library.isa()})"
        assert engine.which_kernel(without) == "body"


def test_sessions_and_threads_at_once():
    """Two sessions, four Python threads each: all get their own answer."""
    weights = [random_weight(64, 128, pattern, dtype=torch.bfloat16) for pattern in ("unstructured", "2:4")]
    runtimes = [
        native(operator_model(weight, pattern, None), 2)
        for weight, pattern in zip(weights, ("unstructured", "2:4"), strict=True)
    ]
    wrong = []

    def ask(index, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            x = torch.randn(1 + seed % 7, 128, generator=generator)
            (y,) = runtimes[index].run(None, {"x": x.numpy()})
            if not np.allclose(y, x @ weights[index].float().T, atol=1e-4):
                wrong.append((index, seed))

    threads = [threading.Thread(target=ask, args=(seed % 2, seed)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", TYPES, ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "dense"])
def test_nothing_behind_the_values_is_read(tmp_path, values, pattern):
    """The values end with the last page of a mapped file: a byte more would end the process."""
    page, n = 4096, 256
    kept = n if pattern == "dense" else n // 2
    m = 2 * page // values.itemsize // kept
    weight = random_weight(m, n, "dense" if pattern == "dense" else "2:4", dtype=values)
    tensors = operator_tensors(weight, pattern)
    assert tensors["weight" if pattern == "dense" else "values"].nbytes == 2 * page
    save(operator_model(weight, pattern, None), tmp_path)
    runtime = native(str(tmp_path / "model.onnx"))
    for tokens in (1, 4, 9):
        x = torch.randn(tokens, n)
        (y,) = runtime.run(None, {"x": x.numpy()})
        assert relative_error(y, x.double() @ weight.double().T) <= TOLERANCE[torch.float32]


MEMORY = """
import sys, numpy as np
from sparse_rt.exporters.onnx import session, which_kernel
def anonymous():
    lines = open("/proc/self/smaps_rollup").read().split("Anonymous:")
    return int(lines[1].split()[0]) * 1024
session(sys.argv[1], threads=1).run(None, {"x": np.ones((1, 64), np.float32)})  # what a first session costs
before = anonymous()
runtime = session(sys.argv[2], threads=1)
runtime.run(None, {"x": np.ones((1, 4096), np.float32)})
print(anonymous() - before, which_kernel(runtime).split()[0])
"""


@pytest.mark.slow
def test_values_stay_in_the_mapped_file(tmp_path):
    sizes = {}
    for name, m, n in (("small", 16, 64), ("large", 16384, 4096)):
        (tmp_path / name).mkdir()
        weight = random_weight(m, n, "2:4", dtype=torch.bfloat16)
        sizes[name] = save(operator_model(weight, "2:4", "streaming"), tmp_path / name)
    folders = [str(tmp_path / name) for name in sizes]
    done = subprocess.run([sys.executable, "-c", MEMORY, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    gained, kernel = done.stdout.split()
    assert kernel == "native" and int(gained) < 0.1 * sizes["large"]


def moved(offsets):
    changed = offsets.clone()
    changed[3] += 1
    return changed


BAD = {
    "mask too narrow": ("unstructured", "mask", lambda t: t[:, :-1], r"mask must be \[rows, 8\] for 64 columns"),
    "mask with a row less": (
        "unstructured",
        "mask",
        lambda t: t[:-1],
        "row_offsets has 25 entries, mask of 23 rows needs 24",
    ),
    "offsets moved": ("unstructured", "row_offsets", moved, "row 2: mask keeps 32 columns, row_offsets give it 33"),
    "offsets from 1": ("unstructured", "row_offsets", lambda t: t + 1, "must begin with 0, not 1"),
    "offsets down": ("unstructured", "row_offsets", lambda t: -t, "row 0: mask keeps 32 columns"),
    "values cut": ("unstructured", "values", lambda t: t[:-5], "row 23: row_offsets end at value 768, values has 763"),
    "a mask bit more": ("unstructured", "mask", lambda t: t | 1, "row_offsets give it 32 values"),
    "2:4 values cut": ("2:4", "values", lambda t: t[:, :-1], "values holds 744, a 2:4 weight .24, 64. has 768"),
    "2:4 nibble twice": ("2:4", "meta", lambda t: t * 0, "row 0, columns from 0: meta 0x00 names no two columns"),
    "2:4 meta too wide": ("2:4", "meta", lambda t: torch.cat([t, t], 1), r"meta must be \[rows, 8\] for 64 columns"),
    "dense columns cut": ("dense", "weight", lambda t: t[:, :-1], r"weight must be \[rows, 64\], it has 2 dim"),
    "dense vector": ("dense", "weight", lambda t: t[0], r"weight must be \[rows, 64\], it has 1 dimensions"),
    "dense integers": ("dense", "weight", lambda t: t.to(torch.int32), "values must be float"),
    "integer values": ("unstructured", "values", lambda t: t.float().to(torch.int32), "values must be float"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("tokens", [1, 9])
def test_bad_files_end_in_a_sentence(case, tokens):
    pattern, name, change, message = BAD[case]
    weight = random_weight(24, 64, "2:4", dtype=torch.bfloat16)
    tensors = operator_tensors(weight, pattern)
    model = operator_model(weight, pattern, None, tensors={name: change(tensors[name])})
    runtime = native(model)
    for _ in range(2):  # a failed check is not remembered as a good one
        with pytest.raises(Exception, match=rf"sparse_rt\.\w+Linear: .*{message}"):
            runtime.run(None, {"x": np.ones((tokens, 64), np.float32)})


def test_x_of_another_width():
    weight = random_weight(24, 64, "unstructured")
    model = operator_model(weight, "unstructured", None)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "columns"
    with pytest.raises(Exception, match="x ends in 60 columns, in_features is 64"):
        native(model).run(None, {"x": np.ones((1, 60), np.float32)})


# ---- how it is had --------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_function_does_the_work(monkeypatch, caplog):
    weight = random_weight(24, 64, "unstructured")
    model = operator_model(weight, "unstructured", "folding")
    monkeypatch.setattr(library, "unavailable_reason", lambda: "no C compiler was found; install one")
    monkeypatch.setattr(engine, "_told", set())
    settings = onnxruntime.SessionOptions()
    for _ in range(2):
        assert not engine.register(settings)
    assert [record.getMessage().count("no C compiler was found") for record in caplog.records] == [1]
    with pytest.raises(UserError, match="the operators for ONNX Runtime cannot be used: no C compiler"):
        engine.register(settings, required=True)
    runtime = session(model, prepare=engine.register)
    x = torch.randn(2, 64)
    assert np.allclose(runtime.run(None, {"x": x.numpy()})[0], x @ weight.T, atol=1e-5)
    assert engine.which_kernel(runtime) == "body"


def test_the_library_needs_no_onnxruntime(tmp_path, monkeypatch):
    """Built from our sources alone, into the cache, once."""
    monkeypatch.setenv("SPARSE_RT_CACHE_DIR", str(tmp_path))
    library.path.cache_clear()
    try:
        built = library.path()
        stamp = built.stat().st_mtime_ns
        library.path.cache_clear()
        assert library.path() == built and built.stat().st_mtime_ns == stamp
        assert built.parent == tmp_path / "onnx"
        assert b"libonnxruntime" not in built.read_bytes()
    finally:
        library.path.cache_clear()


def test_an_instruction_set_that_does_not_exist():
    with pytest.raises(BackendError, match="SPARSE_RT_NATIVE_ISA=mmx: .* allowed are scalar, avx2, avx512"):
        library.use_isa("mmx")
    assert library.isa() in ISAS


def test_a_runtime_before_1_17_gets_no_operators():
    """Its table of functions has no version 17: nothing is registered, nothing fails, the functions do the work."""
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    asked = []
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api(lambda version: asked.append(version)), ctypes.c_void_p), None)
    register = ctypes.CDLL(str(library.path())).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, base) is None and asked == [17]
