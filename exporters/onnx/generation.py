"""A small generate loop over plain ONNX Runtime: for checks, benchmarks and demos, and as an example to copy."""

from __future__ import annotations

import contextlib
import ctypes
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sparse_rt.errors import UserError
from sparse_rt.exporters.onnx.engine import BASE_NOTE, Kernel, session, which_kernel
from sparse_rt.optional import require


@dataclass
class Timings:
    """Seconds of the last ``generate``: the prompt, and every single-token step after it."""

    load: float = 0.0
    prefill: float = 0.0
    decode: list[float] = field(default_factory=list)


class OnnxModel:
    """An exported folder in an ``onnxruntime.InferenceSession`` on the CPU; arguments and errors of ``session``."""

    def __init__(self, folder: str | Path, threads: int | None = None, kernel: Kernel = "auto"):
        self.ort = require("onnxruntime", extra="onnx")
        begin = time.perf_counter()
        self.session = session(folder, threads, kernel)
        self.timings = Timings(load=time.perf_counter() - begin)
        _give_back_memory()
        self._inputs = {entry.name: entry.shape for entry in self.session.get_inputs()}
        self._outputs = [entry.name for entry in self.session.get_outputs()]
        if not any(name.startswith("past_key_values.") for name in self._inputs):
            raise UserError(
                f"{folder} returns {', '.join(self._outputs)} and takes no keys and values of earlier tokens, so it "
                "generates no text; `sparse_rt.exporters.onnx.session` runs it"
            )
        self._pads_right = self.session.get_modelmeta().custom_metadata_map.get(BASE_NOTE) == "genai"

    @property
    def kernel(self) -> str:
        """``which_kernel`` of the session."""
        return which_kernel(self.session)

    def empty_past(self, batch: int) -> dict:
        """Past keys and values of length 0, each [batch, kv heads, 0, head dim] float32."""
        value = self.ort.OrtValue.ortvalue_from_numpy
        return {
            name: value(np.zeros((batch, shape[1], 0, shape[3]), np.float32))
            for name, shape in self._inputs.items()
            if name.startswith("past_key_values.")
        }

    def step(self, ids: np.ndarray, mask: np.ndarray, past: dict | None = None) -> tuple[np.ndarray, dict]:
        """One run: ids [B, S], mask [B, past + S] (0 = padding) -> logits [B, S, vocabulary] float32, new past.

        With base=genai padding is for the first run, and after it a batch goes on by one token at a time.
        """
        ids, mask = np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(mask, np.int64)
        order = None
        if self._pads_right and past is None and not mask.all():
            # GroupQueryAttention only counts the mask: the tokens of a sequence come first, its padding last.
            order = np.argsort(mask == 0, axis=1, kind="stable")
            ids = np.ascontiguousarray(np.take_along_axis(ids, order, axis=1))
        value = self.ort.OrtValue.ortvalue_from_numpy
        feed = {"input_ids": value(ids), "attention_mask": value(mask)}
        if "position_ids" in self._inputs:
            positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
            feed["position_ids"] = value(np.ascontiguousarray(positions))
        # Keys and values stay inside ONNX Runtime between the steps: no copy through numpy.
        results = self.session.run_with_ort_values(self._outputs, feed | (past or self.empty_past(ids.shape[0])))
        new = {
            name.replace("present.", "past_key_values.", 1): result
            for name, result in zip(self._outputs[1:], results[1:], strict=True)
        }
        logits = results[0].numpy()
        if order is not None:
            logits = np.take_along_axis(logits, np.argsort(order, axis=1)[..., None], axis=1)
        return logits, new

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Logits [B, S, vocabulary] of whole sequences ids [B, S]; ``mask`` [B, S] has 0 at (left) padding."""
        ids = np.atleast_2d(ids)
        return self.step(ids, np.ones_like(ids) if mask is None else mask)[0]

    def generate(
        self, ids: Sequence[int] | np.ndarray, max_new_tokens: int, eos: int | Sequence[int] | None = None
    ) -> np.ndarray:
        """Greedy continuation of one prompt [S] or a batch of equal length [B, S]: new tokens [B, <= max_new_tokens].

        Stops early when every sequence has produced ``eos`` (one of them). ``timings`` then holds the seconds of every
        step.
        """
        ids = np.atleast_2d(np.asarray(ids, np.int64))
        mask = np.ones_like(ids)
        self.timings = Timings(load=self.timings.load)
        past, tokens = None, []
        finished = np.zeros(ids.shape[0], bool)
        for index in range(max_new_tokens):
            begin = time.perf_counter()
            logits, past = self.step(ids, mask, past)
            ids = logits[:, -1].argmax(-1)[:, None]
            seconds = time.perf_counter() - begin
            if index:
                self.timings.decode.append(seconds)
            else:
                self.timings.prefill = seconds
            tokens.append(ids)
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
            finished |= np.isin(ids[:, 0], [] if eos is None else eos)
            if finished.all():
                break
        return np.concatenate(tokens, axis=1) if tokens else np.zeros((ids.shape[0], 0), np.int64)


def end_of_text(folder: str | Path) -> list[int]:
    """The tokens that end a text, from generation_config.json or config.json of ``folder``; [] where none is named."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []


def _give_back_memory() -> None:
    """Return what constant folding freed to the system; measured on 51M weights: 1391 MB resident -> 270 MB."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
