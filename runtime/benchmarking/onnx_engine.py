"""ONNX Runtime: our exported file, the dense form of the same model and its int8 and int4 form, in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_rt.benchmarking.models import Pair, read_files, temporary_folder
from sparse_rt.benchmarking.onnx_sides import Side, chosen_sides, compared, write_sides
from sparse_rt.benchmarking.rows import Row, all_in_turn, calls_for, generation_rows
from sparse_rt.child import in_fresh_process
from sparse_rt.config import BenchOptions
from sparse_rt.exporters.folder import file_sizes
from sparse_rt.optional import require
from sparse_rt.progress import Progress

NAME = "onnx"
PHASES = ("disk", "load", "memory", "prefill", "decode")
MODEL_SUFFIXES = (".onnx", ".onnx.data")


def measure(pair: Pair, options: BenchOptions, phases: list[str], progress: Progress) -> tuple[list[Row], dict]:
    """Rows of the asked ``phases`` and the settings they were measured with."""
    sides = chosen_sides(options.quantized)
    dense_bytes = sum(weight.dense_bytes for weight in pair.sparse.weights.values())
    needed = (len(sides) + 1) * dense_bytes + len(sides) * pair.sparse.total_bytes
    with temporary_folder(needed, "the exported ONNX models", "") as temporary:
        folders, facts = write_sides(sides, pair.sparse.folder, temporary, progress)
        comparison = Comparison(sides, folders, pair.vocabulary, options, progress)
        rows = comparison.rows(phases)
    settings = {
        "threads": torch.get_num_threads(),
        "onnxruntime": require("onnxruntime", "onnx").__version__,
        "exported": facts,
        "kernels": comparison.kernels,
        "dense_linear": "MatMul of ONNX Runtime on the decompressed weights",
    }
    if options.quantized:
        from sparse_rt.benchmarking.onnx_quantized import DESCRIPTION

        settings["quantized"] = DESCRIPTION
    return rows, settings


class Comparison:
    """The rows of exported folders, by the names of their sides; ``kernels`` says what ran those of ours."""

    def __init__(
        self,
        sides: list[Side],
        folders: dict[str, Path],
        vocabulary: int,
        options: BenchOptions,
        progress: Progress,
    ):
        self.pairs, self.folders, self.vocabulary = compared(sides), folders, vocabulary
        self.options, self.progress = options, progress
        self.ours = [side.name for side in sides if side.ours]
        self.kernels: dict[str, str] = {}

    def rows(self, phases: list[str]) -> list[Row]:
        rows: list[Row] = []
        if "disk" in phases:
            sizes = {side: [model_bytes(folder)] for side, folder in self.folders.items()}
            rows += self._rows("disk", "exported model", "bytes", sizes)
        if "load" in phases or "memory" in phases:
            for folder in self.folders.values():
                read_files(file for file in folder.iterdir() if file.is_file())
        if "load" in phases:
            rows += self.load_rows()
        if "memory" in phases:
            rows += self.memory_rows()
        generating = "prefill" in phases or "decode" in phases
        if set(phases) - {"disk"}:
            opened = self.folders if generating else self.ours
            sessions = {side: _open(self.folders[side]) for side in opened}
            self.kernels = {side: sessions[side].kernel for side in self.ours}
        for batch in self.options.batch if generating else ():
            rows += [row for row in self.generation_rows(sessions, batch, phases) if row.phase in phases]
        return rows

    def load_rows(self) -> list[Row]:
        """Seconds of creating a session, files in the page cache."""
        opened = {side: lambda folder=folder: _open(folder).timings.load for side, folder in self.folders.items()}
        note = "session creation in one process, files in the page cache"
        return self._rows("load", "session creation", "s", self._in_turn(opened, "load"), note)

    def memory_rows(self) -> list[Row]:
        """What a session and one prompt add to a process of their own; no rows where the system does not tell."""
        request = {
            "threads": torch.get_num_threads(),
            "tokens": self.options.prompt_tokens,
            "vocabulary": self.vocabulary,
        }

        def worker(folder: Path) -> Callable[[], dict[str, Any]]:
            target = "sparse_rt.benchmarking.onnx_fresh:memory_once"
            return lambda: in_fresh_process(target, {**request, "folder": str(folder.absolute())})

        samples = self._in_turn({side: worker(folder) for side, folder in self.folders.items()}, "memory")
        if not all(sample for found in samples.values() for sample in found):
            return []
        before = statistics.median([sample["before"] for found in samples.values() for sample in found]) / 1e6
        note = (
            f"fresh process, session and one prompt of {self.options.prompt_tokens} tokens, on top of {before:.0f} MB "
            "of Python and libraries"
        )
        kinds = (
            ("anonymous", "anonymous after one prompt", f"{note}; without the pages of mapped files"),
            ("resident", "resident after one prompt", f"{note}; with the pages read of mapped files"),
            ("peak", "resident at its peak", f"{note}; what opening the session takes for a while included"),
        )
        return [
            row for part, what, text in kinds for row in self._rows("memory", what, "bytes", _part(samples, part), text)
        ]

    def generation_rows(self, sessions: dict[str, Any], batch: int, phases: list[str]) -> list[Row]:
        """Prefill and decode at one batch size, from the same generations."""
        options = self.options
        steps = options.new_tokens - 1 if "decode" in phases else 0  # the prefill gives the first new token
        generations = {
            side: Generation(session, batch, options.prompt_tokens, self.vocabulary)
            for side, session in sessions.items()
        }
        calls = calls_for(max(generation.sample(1, 1)[0] for generation in generations.values()))
        taken = {
            side: lambda generation=generation: generation.sample(steps, calls)
            for side, generation in generations.items()
        }
        samples = self._in_turn(taken, f"prefill and decode, batch {batch}")
        several = f"each sample is the median of {calls} prompts, or the mean of all steps after them"
        note = several if calls > 1 else None
        return [
            row
            for other, ours in self.pairs
            for row in generation_rows(NAME, samples[other], samples[ours], batch, options, note, (other, ours))
        ]

    def _in_turn(self, calls: dict[str, Callable[[], Any]], what: str) -> dict[str, list[Any]]:
        return all_in_turn(calls, self.options.repeats, self.progress, f"ONNX Runtime: {what}")

    def _rows(
        self, phase: str, what: str, unit: str, samples: dict[str, list[float]], note: str | None = None
    ) -> list[Row]:
        return [
            Row(NAME, phase, what, unit, samples[other], samples[ours], note=note, models=(other, ours))
            for other, ours in self.pairs
        ]


def model_bytes(folder: Path) -> int:
    return sum(size for name, size in file_sizes(folder).items() if name.endswith(MODEL_SUFFIXES))


def _part(samples: dict[str, list[dict[str, float]]], name: str) -> dict[str, list[float]]:
    return {side: [sample[name] for sample in found] for side, found in samples.items()}


def _open(folder: Path):
    from sparse_rt.exporters.onnx.generation import OnnxModel

    return OnnxModel(folder, threads=torch.get_num_threads())


class Generation:
    """Greedy generation of one session from a fixed prompt."""

    def __init__(self, session, batch: int, prompt_tokens: int, vocabulary: int):
        self.session = session
        self.ids = np.random.default_rng(0).integers(0, vocabulary, (batch, prompt_tokens))

    def sample(self, steps: int, calls: int) -> tuple[float, float]:
        """Seconds of a prefill, the median of ``calls`` generations, and of one decode step, the mean of all of theirs.

        0 steps: 0.0.
        """
        prefills, decodes = [], []
        for _ in range(calls):
            self.session.generate(self.ids, steps + 1)
            prefills.append(self.session.timings.prefill)
            decodes += self.session.timings.decode
        return statistics.median(prefills), statistics.fmean(decodes) if decodes else 0.0
