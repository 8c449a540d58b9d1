"""The operators of the library for ONNX Runtime against its own dense MatMul, layer by layer in one process.

    cd benchmarks
    python onnx_kernels.py --output results/onnx_kernels.jsonl
    python onnx_kernels.py --shape 4096x4096 --tokens 1 --threads 1 --seconds 2         # a look

A column is a session on as many equal layers behind each other as make 144 MB of weights, so that none is in the
third-level cache when its turn comes. Weights lie in a data file that ONNX Runtime maps, as in an export: the sparse
operators read it in place, MatMul makes a copy of its own when the session starts. Columns take turns (timing.py),
times are of one layer:

    dense        MatMul on float32 weights, as large models are served without quantization
    int8, int4   MatMulNBits of ONNX Runtime (blocks of 32, int8 activations), where asked for: not lossless
    sparse       BitmaskLinear or Sparse24Linear, activations float32
    sparse int8  BitmaskLinearQ, a scale for each row, int8 activations: not lossless either

Before a column of ours is timed its result is compared with float64. One JSON row per column but ``dense``; in ``ms``
and ``ratio``: p10, median and p90 over the turns, ``ratio`` is dense / this within a turn; ``limit``: of the bytes.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import click
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from timing import ratio, spread, take_turns

from sparse_rt.benchmarking.machine import commit, cpu_name
from sparse_rt.exporters.onnx import engine, external, functions, library
from sparse_rt.formats import get_format, int8
from sparse_rt.formats.packing import row_offsets
from sparse_rt.optional import require

CELLS = [
    (pattern, sparsity, values)
    for values in ("fp32", "bf16", "int8")
    for pattern, sparsity in (("unstructured", 0.5), ("unstructured", 0.75), ("2:4", 0.5))
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
TYPES = {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16, torch.int8: TensorProto.INT8}
ROTATED_BYTES = 144 << 20
# Of the largest entry of the product. int8: against the weights before they are rounded, with exact activations.
MAX_ERROR = {"fp32": 1e-5, "bf16": 1e-5, "int8": 2e-2}
MIN_TURNS, MAX_TURNS = 7, 400


def store(name: str, value: torch.Tensor, data: BinaryIO) -> onnx.TensorProto:
    kind = {torch.uint8: TensorProto.UINT8, torch.int32: TensorProto.INT32, **TYPES}[value.dtype]
    raw = value.contiguous().flatten().view(torch.uint8).numpy()
    return external.store(TensorProto(name=name, data_type=kind, dims=value.shape), raw.data, data)


def dense_layer(weight: torch.Tensor) -> tuple[str, str, dict, list[torch.Tensor]]:
    return "MatMul", "", {}, [weight.float().T.contiguous()]


def sparse_layer(weight: torch.Tensor, pattern: str, mask: torch.Tensor) -> tuple[str, str, dict, list[torch.Tensor]]:
    values, metadata = get_format(pattern).compress(weight, mask)
    parts = [values, metadata]
    if pattern != "2:4":
        offsets = row_offsets(metadata)
        parts = [values.flatten(), metadata, offsets]
    return functions.operator_of(pattern), functions.DOMAIN, {"in_features": weight.shape[1]}, parts


def int8_layer(weight: torch.Tensor, mask: torch.Tensor) -> tuple[str, str, dict, list[torch.Tensor]]:
    """Every pattern is given by a bitmask here."""
    fmt, (m, n) = get_format("unstructured"), weight.shape
    values, metadata = fmt.compress(weight, mask)
    values, scales = int8.quantize(fmt, values, metadata, m, n)
    attributes = {"in_features": n, "group_size": 0, "accuracy_level": 4}
    return functions.QUANTIZED, functions.DOMAIN, attributes, [values, metadata, row_offsets(metadata), scales]


def bits_layer(weight: torch.Tensor, bits: int) -> tuple[str, str, dict, list[torch.Tensor]]:
    """Random codes: what is measured does not depend on them."""
    m, n = weight.shape
    codes = torch.randint(0, 256, (m, n // 32, 4 * bits), dtype=torch.uint8)
    attributes = {"K": n, "N": m, "bits": bits, "block_size": 32, "accuracy_level": 4}
    return "MatMulNBits", "com.microsoft", attributes, [codes, torch.full((m * (n // 32),), 0.01)]


class Column:
    """A session on copies of one layer, each fed by the input: they do not depend on each other, ONNX Runtime runs
    them one after the other."""

    def __init__(self, layer: tuple[str, str, dict, list[torch.Tensor]], shape: tuple[int, int], threads: int):
        operator, domain, attributes, parts = layer
        self.bytes = sum(part.nbytes for part in parts)
        self.copies = max(2, -(-ROTATED_BYTES // self.bytes))
        m, n = shape
        nodes, tensors = [], []
        self.folder = TemporaryDirectory()
        with Path(self.folder.name, external.DATA_NAME).open("wb") as data:
            for copy in range(self.copies):
                names = [f"{index}.{copy}" for index in range(len(parts))]
                # Copies differ: of equal weights ONNX Runtime packs one, and all layers would read that.
                scaled = [part * (copy + 1) if part.is_floating_point() else part for part in parts]
                tensors += [store(name, part, data) for name, part in zip(names, scaled, strict=True)]
                nodes.append(helper.make_node(operator, ["x", *names], [f"y{copy}"], domain=domain, **attributes))
        outputs = [helper.make_tensor_value_info(f"y{c}", TensorProto.FLOAT, ["tokens", m]) for c in range(self.copies)]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", n])
        graph = helper.make_graph(nodes, "layers", [x], outputs, tensors)
        imports = [helper.make_opsetid("", 21), helper.make_opsetid(domain or "sparse_rt", 1)]
        ort = require("onnxruntime", "onnx")
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        engine.register(options, required=True)
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        path = Path(self.folder.name, "model.onnx")
        onnx.save(model, path)
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, x: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"x": x})[0]


def pruned(shape: tuple[int, int], pattern: str, sparsity: float) -> torch.Tensor:
    scores = torch.rand(shape)
    return scores >= sparsity if pattern == "unstructured" else get_format(pattern).mask_from_scores(scores)


def measure(shape: tuple[int, int], tokens: int, threads: int, seconds: float, bits: list[int]):
    """The rows of one shape, number of tokens and threads."""
    weight = torch.randn(shape) * 0.02
    x = torch.randn(tokens, shape[1])
    columns = {"dense": Column(dense_layer(weight), shape, threads)}
    columns |= {f"int{b}": Column(bits_layer(weight, b), shape, threads) for b in bits}
    for pattern, sparsity, values in CELLS:
        mask = pruned(shape, pattern, sparsity)
        kept = (weight * mask).to(DTYPES[values])
        layer = int8_layer(kept, mask) if values == "int8" else sparse_layer(kept, pattern, mask)
        column = Column(layer, shape, threads)
        expected = x.double() @ kept.double().T
        error = (torch.from_numpy(column.run(x.numpy())) - expected).abs().max() / expected.abs().max()
        if error > MAX_ERROR[values]:
            raise click.ClickException(f"{pattern} {sparsity} {values}, {tokens} tokens: {error:.2g} off")
        columns[f"{pattern} {sparsity:g} {values}"] = column
    calls = {name: (lambda turn, column=column: column.run(x.numpy())) for name, column in columns.items()}
    samples = take_turns(
        calls, seconds=seconds * len(calls), min_turns=MIN_TURNS, max_turns=MAX_TURNS, one_thread=threads == 1
    )
    each = {name: [s / columns[name].copies for s in samples.wall[name]] for name in columns}
    shared = {
        "benchmark": "onnx_kernels",
        "shape": list(shape),
        "tokens": tokens,
        "threads": threads,
        "turns": samples.turns,
        "busy_cores": samples.busy_cores,
        "isa": library.isa(),
        "onnxruntime": require("onnxruntime", "onnx").__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "processor": cpu_name(),
        "dense_ms": spread(each["dense"], 1e3),
    }
    for name in columns:
        if name != "dense":
            yield shared | {
                "cell": name,
                "ms": spread(each[name], 1e3),
                "ratio": ratio(each["dense"], each[name]),
                "limit": round(columns["dense"].bytes / columns[name].bytes, 3),
            }


def line(row: dict) -> str:
    where = f"{row['shape'][0]}x{row['shape'][1]} {row['tokens']} tokens {row['threads']} threads"
    times = f"{row['ms']['median']:.3g} ms, dense {row['dense_ms']['median']:.3g}"
    return f"{where} {row['cell']}: {times}, {row['ratio']['median']:.2f}x of {row['limit']:.2f}x"


def parse_shape(_context, _parameter, values: tuple[str, ...]) -> list[tuple[int, int]]:
    try:
        return [(int(rows), int(columns)) for rows, columns in (value.split("x") for value in values)]
    except ValueError:
        raise click.BadParameter("write ROWSxCOLUMNS, 4096x4096") from None


@click.command(help=__doc__.split("\n")[0])
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines; appended to")
@click.option("--shape", "shapes", multiple=True, default=("4096x4096", "11008x4096"), callback=parse_shape)
@click.option("--tokens", multiple=True, type=int, default=(1, 4, 8, 16, 64, 512), show_default=True)
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--bits", multiple=True, type=int, default=(8, 4), show_default=True, help="MatMulNBits beside them")
@click.option("--seconds", type=float, default=4.0, show_default=True, help="of each column")
def main(output, shapes, tokens, threads, bits, seconds):
    for shape in shapes:
        for count in threads:
            for some in tokens:
                for row in measure(shape, some, count, seconds, list(bits)):
                    click.echo(line(row))
                    if output:
                        with output.open("a") as file:
                            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
