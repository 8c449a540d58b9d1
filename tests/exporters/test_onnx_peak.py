"""Memory of the export itself: one weight at a time, never the model."""

import json
import subprocess
import sys

import pytest

import helpers
from sparse_rt.checkpoint import Checkpoint

# Exports every folder given; prints for all but the first, which pays for what is made once, by how much the process
# grew at most.
EXPORT = """
import gc, json, sys, threading, time
from pathlib import Path
import accelerate, onnx, torch.onnx, transformers
from sparse_rt.exporters.onnx.exporter import OnnxExporter
def anonymous():
    lines = Path("/proc/self/status").read_text().split("RssAnon:")
    return int(lines[1].split()[0]) * 1024
def peak_of(source):
    output = Path(sys.argv[2]) / str(len(peaks))
    output.mkdir()
    gc.collect()
    before, peak, done = anonymous(), [0], []
    def watch():
        while not done:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    OnnxExporter().export(Path(source), output, **json.loads(sys.argv[1]))
    done.append(True)
    thread.join()
    return peak[0] - before
peaks = []
for source in sys.argv[3:]:
    peaks.append(peak_of(source))
print(json.dumps(peaks[1:]))
"""


def model(folder, layers, width):
    """A Llama whose weights are as wide as they are high, and how many bytes the compressed ones take."""
    if not (folder / "sparse").exists():
        sizes = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 4, "num_key_value_heads": 4}
        dense = helpers.tiny_model(folder / "dense", "llama", num_hidden_layers=layers, **sizes)
        helpers.compress_folder(dense, folder / "sparse", "unstructured")
    checkpoint = Checkpoint.open(folder / "sparse")
    return folder / "sparse", sum(checkpoint.stored_bytes(name) for name in checkpoint.weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("peak")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"base": "genai"}, (6, 1024), (24, 1024)),
        ({"base": "genai", "values": "int8", "group_size": 64}, (6, 1024), (24, 1024)),
        ({"base": "portable"}, (3, 64), (3, 1536)),  # tracing takes memory by the layer, however wide it is
    ],
    ids=["genai", "genai int8", "portable"],
)
def test_an_export_never_holds_the_model(folder, tmp_path, options, before, after):
    """Twice: what the second model has more of weights is no memory, and neither are the weights of either."""
    models = [model(folder / f"{layers} {width}", layers, width) for layers, width in ((1, 64), before, after)]
    sources = [str(source) for source, _ in models]
    command = [sys.executable, "-c", EXPORT, json.dumps(options), str(tmp_path), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks, added = json.loads(done.stdout.splitlines()[-1]), models[2][1] - models[1][1]
    # Measured: up to 12 MB for 149 MB of weights (83 MB as int8, 528 MB in float32), up to 10 MB for 56 MB (198 MB).
    assert peaks[1] - peaks[0] < added / 3
    # Measured: up to 62 MB, with int8: the three matrices of 4 MB that genai joins, several times over.
    assert max(peaks) < 80e6
