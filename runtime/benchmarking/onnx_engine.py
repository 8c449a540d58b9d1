"""ONNX Runtime: the exported sparse file against the exported dense form of the same model, in this process."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import torch

from sparse_rt.benchmarking.models import Pair, read_files, temporary_folder
from sparse_rt.benchmarking.rows import SIDES, Row, calls_for, calls_note, generation_rows, in_turn
from sparse_rt.config import BenchOptions
from sparse_rt.exporters.folder import file_sizes
from sparse_rt.exporters.onnx.exporter import OnnxExporter
from sparse_rt.optional import require
from sparse_rt.progress import Progress

NAME = "onnx"
PHASES = ("disk", "load", "prefill", "decode")
MODEL_SUFFIXES = (".onnx", ".onnx.data")


def measure(pair: Pair, options: BenchOptions, phases: list[str], progress: Progress) -> tuple[list[Row], dict]:
    """Rows of the asked ``phases`` and the settings they were measured with."""
    needed = 3 * sum(weight.dense_bytes for weight in pair.sparse.weights.values()) + 2 * pair.sparse.total_bytes
    with temporary_folder(needed, "the exported ONNX models", "") as temporary:
        folders, facts = {side: temporary / side for side in SIDES}, {}
        for side, chosen in (("dense", {"form": "dense"}), ("sparse", {})):
            progress.stage(f"exporting the {side} ONNX model")
            folders[side].mkdir()
            facts[side] = OnnxExporter().export(pair.sparse.folder, folders[side], **chosen)
        rows = measure_folders(folders, pair.vocabulary, options, phases, progress)
    settings = {
        "threads": torch.get_num_threads(),
        "onnxruntime": require("onnxruntime", "onnx").__version__,
        "exported": facts,
        "dense_linear": "MatMul of ONNX Runtime on the decompressed weights",
    }
    return rows, settings


def measure_folders(
    folders: dict[str, Path], vocabulary: int, options: BenchOptions, phases: list[str], progress: Progress
) -> list[Row]:
    """The rows of two exported folders."""
    rows = []
    if "disk" in phases:
        sizes = {side: [model_bytes(folder)] for side, folder in folders.items()}
        rows.append(Row(NAME, "disk", "exported model", "bytes", sizes["dense"], sizes["sparse"]))
    if "load" in phases:
        rows.append(load_row(folders, options, progress))
    if "prefill" in phases or "decode" in phases:
        sessions = {side: _open(folder) for side, folder in folders.items()}
        steps = options.new_tokens - 1 if "decode" in phases else 0  # the prefill gives the first new token
        for batch in options.batch:
            generations = {
                side: Generation(session, batch, options.prompt_tokens, vocabulary)
                for side, session in sessions.items()
            }
            measured = inference_rows(generations, batch, steps, options, progress)
            rows += [row for row in measured if row.phase in phases]
    return rows


def model_bytes(folder: Path) -> int:
    return sum(size for name, size in file_sizes(folder).items() if name.endswith(MODEL_SUFFIXES))


def _open(folder: Path):
    from sparse_rt.exporters.onnx.generation import OnnxModel

    return OnnxModel(folder, threads=torch.get_num_threads())


def load_row(folders: dict[str, Path], options: BenchOptions, progress: Progress) -> Row:
    """Seconds of creating a session, files in the page cache."""
    for folder in folders.values():
        read_files(file for file in folder.iterdir() if file.is_file())
    seconds = in_turn(
        lambda: _open(folders["dense"]).timings.load,
        lambda: _open(folders["sparse"]).timings.load,
        options.repeats,
        progress,
        "ONNX Runtime: load",
    )
    note = "session creation in one process, files in the page cache"
    return Row(NAME, "load", "session creation", "s", *seconds, note=note)


class Generation:
    """Greedy generation of one session from a fixed prompt."""

    def __init__(self, session, batch: int, prompt_tokens: int, vocabulary: int):
        self.session = session
        self.ids = np.random.default_rng(0).integers(0, vocabulary, (batch, prompt_tokens))

    def sample(self, steps: int, calls: int) -> tuple[float, float]:
        """Median seconds of a prefill and of one decode step (0 steps: 0.0) over ``calls`` generations."""
        prefills, decodes = [], []
        for _ in range(calls):
            self.session.generate(self.ids, steps + 1)
            prefills.append(self.session.timings.prefill)
            decodes += self.session.timings.decode
        return statistics.median(prefills), statistics.fmean(decodes) if decodes else 0.0


def inference_rows(generations: dict, batch: int, steps: int, options: BenchOptions, progress: Progress) -> list[Row]:
    """Prefill and decode at one batch size, from the same generations."""
    calls = calls_for(max(generation.sample(1, 1)[0] for generation in generations.values()))
    dense, sparse = in_turn(
        lambda: generations["dense"].sample(steps, calls),
        lambda: generations["sparse"].sample(steps, calls),
        options.repeats,
        progress,
        f"ONNX Runtime: prefill and decode, batch {batch}",
    )
    return generation_rows(NAME, dense, sparse, batch, options, calls_note(calls))
