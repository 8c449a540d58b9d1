"""The README of an exported ONNX folder: how to run it, what is inside, what to expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.exporters.onnx.engine import MODEL_NAME
from sparse_rt.exporters.onnx.external import DATA_NAME
from sparse_rt.exporters.onnx.manifest import NAME as MANIFEST_NAME
from sparse_rt.report import size

_SNIPPET = """```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

folder = "."
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
tokenizer = AutoTokenizer.from_pretrained(folder)
outputs = [output.name for output in session.get_outputs()]
past = {
    entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    for entry in session.get_inputs()
    if entry.name.startswith("past_key_values.")
}
ids, tokens, length = np.array([tokenizer("def main():")["input_ids"]]), [], 0
for _ in range(20):
    length += ids.shape[1]
    feed = {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64), **past}
POSITIONS    results = dict(zip(outputs, session.run(outputs, feed)))
    past = {name.replace("present.", "past_key_values."): results[name] for name in outputs[1:]}
    ids = results["logits"][:, -1:].argmax(-1)
    tokens.append(int(ids[0, 0]))
print(tokenizer.decode(tokens))
```"""
_ENCODER_SNIPPET = """```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

folder = "."
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
encoded = AutoTokenizer.from_pretrained(folder)("def main():", return_tensors="np")
ids = encoded["input_ids"].astype(np.int64)
feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}  # 0 at padding
TYPESnames = [output.name for output in session.get_outputs()]
for name, value in zip(names, session.run(names, feed)):
    print(name, value.shape)
```"""
_TYPES = 'feed["token_type_ids"] = encoded.get("token_type_ids", np.zeros_like(ids)).astype(np.int64)\n'
_POSITIONS = '    feed["position_ids"] = np.arange(length - ids.shape[1], length)[None]\n'

_LIBRARY = """\
With `pip install sparse-rt` and a C compiler, `sparse_rt.exporters.onnx.session(".")` opens the same file with
operators that multiply the compressed weights as they lie in it: nothing is decompressed at load, and
`which_kernel(session)` tells whether they run.GENERATE

"""
_GENERATE = " `sparse-rt generate . --engine onnx --prompt TEXT` does both."
_IN_OUT = """\
Inputs: `input_ids`, `attention_mask`POSITIONS, `past_key_values.N.key/value`;
outputs: `logits`, `present.N.key/value`. Batch, sequence and past are dynamic; the first call has a past of length 0.
Activations are float32."""
_ENCODER_IN_OUT = """\
Inputs: INPUTS, int64 [batch, sequence]; outputs: OUTPUTS. Both lengths are
dynamic. Activations are float32."""
_GENAI = """
`onnxruntime_genai.Model(".")` opens the folder as well. Set `max_length`: keys and values get one buffer of that length
at once. The shorter prompts of a batch are padded on the right, because attention counts the mask and does not look
where it is 0; after the prompts a batch goes on by one token at a time.
"""
_VERSIONS = {
    "portable": " (opset 23: version 1.23 or newer; `opset=18` also runs on 1.20)",
    "genai": " (tested: version 1.32)",
}
_JOINED = """
The graph is that of onnxruntime-genai's model builder. Its attention and norms are operators of ONNX Runtime
(`GroupQueryAttention`, `SkipSimplifiedLayerNormalization`): no other runtime reads the file, and `onnx.checker` does
not know them. q, k and v of a layer are one product where they are stored alike; `sparse_rt.rows` of that node names
the three, first rows first.
"""
_TENSORRT = """\
TensorRT can use 2:4 weights in this form (`--sparsity=enable`); whether it does, its build log says.
"""
_FORMS = {
    "function": """\
Linear layers are operators of domain `sparse_rt`: {operators}. Each is defined in the file itself, as a
model-local function of standard operators, so an ONNX Runtime that knows opset {opset} runs it without an extra
library{versions}. A runtime that has a kernel of that name uses the kernel instead of the function.
""",
    "inline": """\
The decompression is written out in standard operators, for runtimes without model-local functions. OpenVINO 2026.4
reads it with `body=folding`; it cannot read the Scan of `body=streaming`.
""",
    "dense": """\
Every layer is an ordinary MatMul and the weights are stored dense, zeros included: the file is as large as the dense
model.
""",
}

_PLAIN = "Weights have the bits and the dtype of the checkpoint."
_INT8 = """\
Kept weights are int8 values (`weight_values`) times a float32 scale (`weight_scale`) of their row or of a group of its
columns; dense layers have the bits of the checkpoint."""
_ROUNDED = """ With `accuracy_level` 4 our operators round activations to int8, too, on processors with
AVX-512 VNNI; everything else takes them as float32."""
_NODES = """ A compressed layer is a node named after its module, with its
pattern and sparsity."""

_BODIES = {
    "folding": """\
The body is *folding*: without a kernel for the operators, ONNX Runtime decompresses the weights once, while it opens
the session, and then runs dense float32 MatMuls: expect the speed and, in the end, the memory of a dense model. What
stays small is the file. Opening takes about {peak} until folding ends (31 bytes a weight were measured), and glibc
keeps what was freed until `ctypes.CDLL("libc.so.6").malloc_trim(0)`. If that is too much, export with
`body=streaming` (small in memory, slow) or `form=dense` (opens quickly).

Measured on a small Llama (3.7 million sparse weights at 2:4, ONNX Runtime 1.31, one thread): 1.2 s and 156 MB at the
peak to open, against 0.2 s and 69 MB for the dense form; with the freed memory given back both then
take the same memory and time.
""",
    "streaming": """\
The body is *streaming*: without a kernel for the operators, ONNX Runtime decompresses 64 rows at a time in every call.
Compressed weights stay compressed in memory (layers that are not are widened to float32), and every call pays for it:
a token took about 30 times as long as with the dense
form on a Llama with 51 million sparse weights (ONNX Runtime 1.31, one thread). Folding them once while opening
(`body=folding`) would take about {peak}; for speed without a
kernel export with `form=dense`.
""",
}


def write_readme(folder: Path, checkpoint: Checkpoint, facts: dict[str, Any], fold_bytes: int) -> None:
    """Write README.md for the export that ``facts`` describe (base, form, body, opset, values).

    ``fold_bytes``: what folding takes in all.
    """
    weights = checkpoint.weights.values()
    total, kept = sum(entry.m * entry.n for entry in weights), sum(entry.nnz for entry in weights)
    patterns = ", ".join(sorted({entry.pattern for entry in weights}))
    proto = onnx.load(str(folder / MODEL_NAME), load_external_data=False)
    operators = ", ".join(f"`{function.name}`" for function in proto.functions)
    body = ""
    base = facts["base"]
    form = _FORMS[facts["form"]].format(opset=facts["opset"], versions=_VERSIONS[base], operators=operators)
    if facts["form"] == "dense" and base == "portable":
        form += _TENSORRT
    if facts["body"]:
        body = "\n" + _BODIES[facts["body"]].format(peak=size(fold_bytes))
    values = _INT8 if facts["values"] == "int8" else _PLAIN
    nodes = _NODES if facts["form"] == "function" else ""
    if facts["form"] == "function" and facts["values"] == "int8":
        values += _ROUNDED
    sizes = "\n".join(f"| `{name}` | {size((folder / name).stat().st_size)} |" for name in (MODEL_NAME, DATA_NAME))
    text = f"""# ONNX export of a sparse model

{len(weights)} linear weights ({patterns}); {1 - kept / total:.1%} of their {total:,} entries are not stored. Made by
sparse-rt from `{checkpoint.folder.name}`.

| file | size |
|---|---|
{sizes}

## Run

`pip install onnxruntime transformers`, then, in this folder:

{_how_to_run(proto, facts["form"] == "function")}
{_GENAI if base == "genai" else ""}
## What is inside

{form}{body}{_JOINED if base == "genai" else ""}
{values} `metadata_props` of the model (`sparse_rt.*`) hold form, body and pattern.{nodes} `{MANIFEST_NAME}` lists
every layer, and says why it is dense where it is.
"""
    (folder / "README.md").write_text(text)


def _how_to_run(proto: onnx.ModelProto, operators: bool) -> str:
    """A program, the library where ``operators`` of ours are in the graph, inputs and outputs."""
    inputs, outputs = ([entry.name for entry in entries] for entries in (proto.graph.input, proto.graph.output))
    generates = any(name.startswith("past_key_values.") for name in inputs)
    library = _LIBRARY.replace("GENERATE", _GENERATE if generates else "") if operators else ""
    if generates:
        positions = "position_ids" in inputs
        program = _SNIPPET.replace("POSITIONS", _POSITIONS if positions else "")
        described = _IN_OUT.replace("POSITIONS", ", `position_ids`" if positions else "")
    else:
        program = _ENCODER_SNIPPET.replace("TYPES", _TYPES if "token_type_ids" in inputs else "")
        described = _ENCODER_IN_OUT.replace("INPUTS", _quoted(inputs)).replace("OUTPUTS", _quoted(outputs))
    return f"{program}\n\n{library}{described}"


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
