"""Encoders and classifiers as ONNX: every output equals torch's, the README's program runs, the rest is refused."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx_models import compressed, exported

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import ExportOptions, GenerateOptions
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.exporters.onnx import session, which_kernel
from sparse_rt.exporters.onnx.exporter import OnnxExporter
from sparse_rt.workflows.export import export
from sparse_rt.workflows.generate import generate

MASKED, BARE, TEXTS = "AutoModelForMaskedLM", "AutoModel", "AutoModelForSequenceClassification"
TOKENS, ANSWERS, PRETRAINING = (
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForPreTraining",
)
CASES = [
    ("bert", MASKED, "2:4", {}, ["logits"]),
    ("bert", BARE, "unstructured", {"body": "streaming", "opset": 18}, ["last_hidden_state", "pooler_output"]),
    ("bert", PRETRAINING, "4:8", {}, ["prediction_logits", "seq_relationship_logits"]),
    ("bert", ANSWERS, "unstructured", {"values": "int8"}, ["start_logits", "end_logits"]),
    ("roberta", TEXTS, "unstructured", {"form": "inline"}, ["logits"]),
    ("roberta", TOKENS, "2:4", {"form": "dense"}, ["logits"]),
    ("distilbert", TEXTS, "2:4", {}, ["logits"]),
    ("albert", MASKED, "2:4", {}, ["logits"]),
    ("deberta", MASKED, "unstructured", {}, ["logits"]),
    ("modernbert", MASKED, "unstructured", {}, ["logits"]),
    ("llama", TEXTS, "unstructured", {}, ["logits"]),
    ("opt", TEXTS, "2:4", {}, ["logits"]),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    source = compressed(folder, "bert", auto=MASKED)
    return source, folder / "onnx", exported(source, folder / "onnx")


@pytest.mark.parametrize(("family", "auto", "pattern", "options", "outputs"), CASES)
def test_every_output_agrees_with_torch(tmp_path, family, auto, pattern, options, outputs):
    source = compressed(tmp_path, family, pattern, auto=auto)
    check = exported(source, tmp_path / "onnx", **options)["check"]
    exact = options.get("form", "function") == "function" and "values" not in options
    assert check["weights_equal"] == len(Checkpoint.open(source).weights) > 0
    for run in ("whole", "padded_batch", "long"):
        assert check[f"{run}_max_difference"] < 1e-5 * max(1.0, check["output_scale"])
        if exact:
            assert check[f"native_{run}_max_difference"] < 1e-5 * max(1.0, check["output_scale"])
    runtime = session(tmp_path / "onnx", threads=1)
    assert [entry.name for entry in runtime.get_outputs()] == outputs
    assert which_kernel(runtime).startswith("native (") == (options.get("form", "function") == "function")


def test_plain_onnxruntime_gives_the_logits_of_the_dense_model(bert, tmp_path):
    """Not by the export's own comparison: two texts of two segments each, padded, and no code of ours."""
    import onnxruntime

    source, output, _ = bert
    dense = exported_dense(source, tmp_path / "dense")
    runtime = onnxruntime.InferenceSession(str(output / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(1).integers(0, 4096, (2, 11))
    types, mask = np.zeros_like(ids), np.ones_like(ids)
    types[:, 5:], mask[1, 7:] = 1, 0
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        expected = dense(**{name: torch.as_tensor(value) for name, value in feed.items()}).logits.numpy()
    (found,) = runtime.run(None, feed)
    assert np.abs(found - expected)[mask == 1].max() < 1e-5
    feed["token_type_ids"] = np.zeros_like(ids)
    assert np.abs(runtime.run(None, feed)[0] - expected)[mask == 1].max() > 1e-3


def exported_dense(source, output):
    export(ExportOptions.build(model=str(source), output_dir=output, to="dense"))
    return transformers.AutoModelForMaskedLM.from_pretrained(output, dtype=torch.float32).eval()


def test_weights_stay_compressed_and_shared_ones_are_stored_once(bert, tmp_path):
    source, _, result = bert
    assert result["weight_bytes"] < 1.1 * Checkpoint.open(source).total_bytes
    shared = compressed(tmp_path, "albert", auto=MASKED, num_hidden_layers=3)
    exported(shared, tmp_path / "onnx")
    proto = onnx.load(str(tmp_path / "onnx" / "model.onnx"), load_external_data=False)
    query = [node for node in proto.graph.node if "attention.query" in node.name and node.domain == "sparse_rt"]
    assert len(query) == 3 and len({node.name for node in query}) == 3 and len({node.input[1] for node in query}) == 1


@pytest.mark.parametrize("auto", [MASKED, ANSWERS])
def test_program_of_the_readme_runs_without_sparse_rt(tmp_path, auto):
    family, types = ("bert", 2) if auto == MASKED else ("roberta", 1)
    source = compressed(tmp_path, family, auto=auto, type_vocab_size=types)
    exported(source, tmp_path / "onnx")
    text = (tmp_path / "onnx" / "README.md").read_text()
    assert ("token_type_ids" in text) == (auto == MASKED) and "sparse-rt generate" not in text
    program = (
        re.search(r"```python\n(.*?)```", text, re.DOTALL)[1] + "\nimport sys\nassert 'sparse_rt' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "onnx", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = ["logits"] if auto == MASKED else ["start_logits", "end_logits"]
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == names


def test_check_sees_a_graph_that_computes_something_else(bert, tmp_path):
    source, output, _ = bert
    proto = onnx.load(str(output / "model.onnx"))
    nodes = {node.name: node for node in proto.graph.node}
    first, second = (nodes[f"bert.encoder.layer.{layer}.intermediate.dense"] for layer in (0, 1))
    first.input[1], second.input[1] = second.input[1], first.input[1]
    first.input[2], second.input[2] = second.input[2], first.input[2]
    onnx.save(proto, str(tmp_path / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    with pytest.raises(CheckFailed, match="whole logits of ONNX Runtime differ from torch by"):
        OnnxExporter().check(source, tmp_path)


def test_what_cannot_be_exported_or_generated_is_said(bert, tmp_path):
    output = bert[1]
    with pytest.raises(UserError, match="returns logits and takes no keys and values of earlier tokens"):
        generate(GenerateOptions.build(model=str(output), engine="onnx", prompt="a"))
    choice = compressed(tmp_path / "choice", "bert", auto="AutoModelForMultipleChoice")
    with pytest.raises(
        UserError, match="BertForMultipleChoice cannot be exported to ONNX: it does not run on token ids"
    ):
        exported(choice, tmp_path / "onnx")
    classifier = compressed(tmp_path / "classifier", "llama", auto=TEXTS)
    with pytest.raises(UserError, match="LlamaForSequenceClassification, which onnxruntime-genai does not run"):
        exported(classifier, tmp_path / "onnx", base="genai")
    both = compressed(tmp_path / "both", "t5", auto="AutoModelForSeq2SeqLM")
    with pytest.raises(UserError, match="has an encoder and a decoder, and the ONNX export writes models of one of"):
        exported(both, tmp_path / "onnx")
    config = json.loads((classifier / "config.json").read_text())
    (classifier / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": True}))
    with pytest.raises(UserError, match="looks at the tokens that follow"):
        exported(classifier, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_file_that_onnxruntime_does_not_open_fails_the_check(bert, tmp_path):
    source, output, _ = bert
    for file in output.iterdir():
        shutil.copy(file, tmp_path)
    proto = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    next(node for node in proto.graph.node if node.op_type == "LayerNormalization").op_type = "InstanceNormalization"
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(CheckFailed, match=r"model\.onnx"):
        OnnxExporter().check(source, tmp_path)


def test_as_many_labels_as_a_text_has_tokens(tmp_path):
    """Seventeen, as many as the check's texts have: a label is for the whole text all the same."""
    source = compressed(tmp_path, "bert", auto=TEXTS, num_labels=17)
    check = exported(source, tmp_path / "onnx")["check"]
    assert check["padded_batch_max_difference"] < 1e-5
