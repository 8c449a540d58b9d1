"""Memory of the export itself: one weight at a time, never the model."""

import subprocess
import sys

import pytest

import helpers

EXPORT = """
import sys, threading, time
from pathlib import Path
import accelerate, onnx, torch.onnx, transformers
from sparse_rt.exporters.onnx.exporter import OnnxExporter
def anonymous():
    lines = Path("/proc/self/status").read_text().split("RssAnon:")
    return int(lines[1].split()[0]) * 1024
options = {"base": sys.argv[1]}
OnnxExporter().export(Path(sys.argv[2]), Path(sys.argv[4]), **options)  # what a first export costs
before, peak, done = anonymous(), [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
OnnxExporter().export(Path(sys.argv[3]), Path(sys.argv[5]), **options)
done.append(True)
thread.join()
print(peak[0] - before)
"""


def model(folder, layers, **sizes):
    dense = helpers.tiny_model(folder / "dense", "llama", num_hidden_layers=layers, **sizes)
    return helpers.compress_folder(dense, folder / "sparse", "unstructured")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["portable", "genai"])
def test_an_export_never_holds_the_model(tmp_path, base):
    """12 layers of 25 MB each when dense in float32, and no more memory than a few copies of one weight."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8}
    small, large = model(tmp_path / "small", 1), model(tmp_path / "large", 12, **sizes)
    outputs = [tmp_path / "first", tmp_path / "second"]
    for output in outputs:
        output.mkdir()
    command = [sys.executable, "-c", EXPORT, base, *map(str, (small, large, *outputs))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dense = 12 * 4 * (1024 * 1024 * 3 + 3 * 1024 * 2048)
    assert int(done.stdout.splitlines()[-1]) < dense / 4
