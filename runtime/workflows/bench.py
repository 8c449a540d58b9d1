"""Dense and sparse side by side in one run: disk, load time, memory, prefill, decode, training step, serving.

The result, which ``report.json`` holds as it is (times in seconds, sizes in bytes, so lower is better everywhere):

    schema        1
    model, baseline, pattern, sparsity, dtype
    baseline_kind "decompressed" (the same weights as dense matrices) or "given"
    date          UTC, ISO 8601
    machine       cpu, cores, threads, device, gpu, load_average, python, sparse_rt, commit, packages, busy_before and
                  busy_during: cores that other processes kept busy (None where that cannot be read)
    machine_line  the same as one line
    settings      prompt_tokens, new_tokens, train_tokens, repeats, batch, request_rate, num_prompts
    engines       per engine the settings both sides ran with; those of onnx hold
                  exported: what the exporter said of each model, and kernels: what multiplied the compressed layers of
                  each of ours, "native (avx512)" or another instruction set, or "body", the functions of the file ({}
                  where no model was opened)
    backends      per operation which backend ran the compressed layers
    rows          engine, phase, what, batch, unit ("s" | "bytes"), note,
                  dense, sparse: median, min, max, samples; sample i of both is one pair, taken one after the other
                  ratio: the same of dense / sparse per pair; above 1 sparse is faster or smaller
                  tokens_per_second: dense, sparse (from the medians), or None
                  models: what stands in dense and in sparse: "dense" and "sparse", or in rows of the engine onnx others
                  ("int8 MatMulNBits", "int4 MatMulNBits"), which ``what`` then names, too
                  request_rate: requests a second or "inf", and metric: "output_throughput" (seconds an output token),
                  "median_ttft", "p99_ttft", "median_tpot" or "p99_tpot"; both None outside the phase serve
    slower        a sentence for each pair of models: where sparse is slower or larger
    warnings, notes
    fail_below    the threshold or None; below: the rows against dense under it as "engine phase batch"
    report        paths of the files written, or None
"""

from __future__ import annotations

import datetime
import importlib
import os
from typing import Any

import torch

from sparse_rt.benchmarking import machine as machines
from sparse_rt.benchmarking.models import Pair, file_bytes, open_pair
from sparse_rt.benchmarking.rendering import COLUMNS, row_name, table_rows, where_sparse_loses, write_report
from sparse_rt.benchmarking.rows import SIDES, Row, json_rate
from sparse_rt.checkpoint import check_output
from sparse_rt.config import ASKED_PHASES, BENCH_PHASES, BenchOptions
from sparse_rt.device import pick_device
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.families import predicts_next_token
from sparse_rt.kernels import packed
from sparse_rt.kernels.backends import FORCE_VARIABLE, Call, explain
from sparse_rt.nn import PACK_VARIABLE
from sparse_rt.optional import available, require
from sparse_rt.progress import Progress

__all__ = ["COLUMNS", "bench", "table_rows"]

SCHEMA = 1
ENGINES = {
    "hf": "sparse_rt.benchmarking.hf_engine",
    "vllm": "sparse_rt.benchmarking.vllm_engine",
    "onnx": "sparse_rt.benchmarking.onnx_engine",
}
# Package that an engine needs beyond the core, and the extra that brings it.
NEEDED = {"vllm": (("vllm", "vllm"),), "onnx": (("onnx", "onnx"), ("onnxruntime", "onnx"))}
# Options that a report repeats.
SETTINGS = {"prompt_tokens", "new_tokens", "train_tokens", "repeats", "batch", "num_prompts"}
# The phases that --fail-below judges: those where "faster" is the claim.
JUDGED = ("prefill", "decode", "train")


def bench(options: BenchOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Measure both sides in turn and report.

    Raises ``UserError`` for a dense model, a baseline that does not fit, an engine that is not installed or lengths the
    model cannot take; ``CheckFailed`` with the result when a judged row is below ``fail_below``.
    """
    progress = progress or Progress()
    if options.report is not None:
        check_output(options.report, options.overwrite)
    wanted = options.phase or set(BENCH_PHASES) - set(ASKED_PHASES)
    phases = [phase for phase in BENCH_PHASES if phase in wanted]
    notes = check_requests(options, phases)
    with open_pair(options.model, options.baseline) as pair:
        check_kind(pair)
        notes += check_wrapper(pair, options, phases)
        check_lengths(pair, options, phases)
        result = measure(pair, options, phases, progress)
    result["notes"] = notes + result["notes"]
    judge(result, options.fail_below)
    if options.report is not None:
        write_report(result, options.report, options.overwrite, progress)
    if result["below"]:
        raise CheckFailed(
            f"speed-up below {options.fail_below:g} against {result['baseline']}: {', '.join(result['below'])}", result
        )
    return result


def check_requests(options: BenchOptions, phases: list[str]) -> list[str]:
    """Refuse what cannot run before any work; returns notes about what is left out. May shorten ``phases``."""
    notes = []
    for engine in options.engine:
        for module, extra in NEEDED.get(engine, ()):
            if not available(module):
                require(module, extra)
    if "train" in phases and "hf" in options.engine and not available("peft"):
        if options.phase:
            require("peft", "train")
        phases.remove("train")
        notes.append('no training step: PEFT is not installed (pip install "sparse-rt[train]")')
    phases_of = {engine: importlib.import_module(module).PHASES for engine, module in ENGINES.items()}
    covered = {"disk"}.union(*(phases_of[engine] for engine in options.engine))
    missing = [phase for phase in options.phase if phase not in covered]
    if missing:
        able = [f"--engine {engine}" for engine, found in phases_of.items() if missing[0] in found]
        raise UserError(
            f"no chosen engine ({', '.join(options.engine)}) measures {missing[0]}; add {' or '.join(able)}"
        )
    if options.fail_below is not None and not set(phases) & set(JUDGED) & covered:
        raise UserError(
            f"--fail-below judges {', '.join(JUDGED)}; add one of them with --phase and an engine that has it"
        )
    return notes


def check_kind(pair: Pair) -> None:
    """``UserError`` for a model that generates no text."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(pair.sparse.folder)
    if not predicts_next_token(config):
        raise UserError(
            f"{pair.sparse.folder} is a {config.architectures[0]}, which predicts no next token; bench times the "
            "generation of text: give a causal language model"
        )


def check_wrapper(pair: Pair, options: BenchOptions, phases: list[str]) -> list[str]:
    """Refuse what a model with wrapped weights cannot do; as ``check_requests`` with what was not asked for."""
    quantization = pair.sparse.quantization
    if quantization.wrapper is None:
        return []
    for engine in options.engine:
        if engine != "hf":
            quantization.refuse_wrapper(f"--engine {engine} cannot run")
    if "train" not in phases:
        return []
    if options.phase:
        quantization.refuse_wrapper("--phase train: no adapter can be trained on")
    phases.remove("train")
    return ["no training step: the model has wrapped weights (--method armor), which no adapter can be trained on"]


def check_lengths(pair: Pair, options: BenchOptions, phases: list[str]) -> None:
    limit = pair.positions
    if limit is None:
        return
    generated = options.prompt_tokens + options.new_tokens
    needs = {
        "--prompt-tokens plus --new-tokens": (generated, {"prefill", "decode", "serve"}),
        "--prompt-tokens": (options.prompt_tokens, {"load", "memory"}),
        "--train-tokens": (options.train_tokens, {"train"}),
    }
    for name, (tokens, concerned) in needs.items():
        if tokens > limit and concerned & set(phases):
            raise UserError(f"{name} is {tokens}, the model has {limit} positions; give fewer tokens")


def measure(pair: Pair, options: BenchOptions, phases: list[str], progress: Progress) -> dict[str, Any]:
    """The result without the verdict on ``fail_below``."""
    facts = machines.machine(pick_device(options.device))
    facts["busy_before"] = machines.busy_before()
    # Asking compiles the native kernels where they are not yet, so that no measurement pays for it.
    backends = chosen_backends(pair, options, facts["device"])
    neighbours = machines.Neighbours()
    rows: list[Row] = []
    if "disk" in phases:
        dense, sparse = [file_bytes(pair.dense)], [file_bytes(pair.sparse)]
        rows.append(Row("files", "disk", "weight files", "bytes", dense, sparse))
    engines = {}
    for name in dict.fromkeys(options.engine):
        engine = importlib.import_module(ENGINES[name])
        wanted = [phase for phase in phases if phase in engine.PHASES]
        if wanted:
            progress.stage(f"engine {name}")
            measured, engines[name] = engine.measure(pair, options, wanted, progress)
            rows += measured
    facts["busy_during"] = neighbours.busy_cores()
    weights = pair.sparse.weights.values()
    described = [row.to_dict() for row in sorted(rows, key=lambda row: BENCH_PHASES.index(row.phase))]
    return {
        "schema": SCHEMA,
        "model": str(options.model),
        "baseline": str(options.baseline) if pair.given else f"{options.model}, decompressed",
        "baseline_kind": "given" if pair.given else "decompressed",
        "pattern": ", ".join(sorted({weight.pattern for weight in weights})),
        "sparsity": 1 - sum(weight.nnz for weight in weights) / sum(weight.m * weight.n for weight in weights),
        "dtype": pair.dtype,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "machine_line": machines.machine_line(facts),
        "settings": options.model_dump(include=SETTINGS)
        | {"request_rate": [json_rate(rate) for rate in options.request_rate]},
        "engines": engines,
        "backends": backends,
        "rows": described,
        "slower": where_sparse_loses(described),
        "warnings": busy_warnings(facts) + kernel_warnings(engines),
        "notes": notes_on(pair, options),
    }


def chosen_backends(pair: Pair, options: BenchOptions, device: str) -> list[dict[str, Any]]:
    """What multiplies the largest compressed layer in inference, by number of tokens: in transformers and in vLLM.

    Where the layer has a derived layout that is ``packed_linear``, otherwise ``linear``.
    """
    weight = max(pair.sparse.weights.values(), key=lambda weight: weight.m * weight.n)
    dtype, kind = getattr(torch, pair.dtype, torch.float32), torch.device(device).type
    shape = weight.pattern, weight.m, weight.n
    sparsity = 1 - weight.nnz / (weight.m * weight.n)
    op = "packed_linear" if packing_refusal(*shape, dtype, kind, sparsity) is None else "linear"
    tokens = sorted({*options.batch, *(batch * options.prompt_tokens for batch in options.batch)})
    calls = [Call(op, *shape, count, dtype, kind) for count in tokens]
    found = [(call, explain(call, os.environ.get(FORCE_VARIABLE) or None).backend) for call in calls]
    return [
        {"op": call.op, "pattern": call.pattern, "tokens": call.tokens, "backend": backend.name if backend else None}
        for call, backend in found
    ]


def packing_refusal(pattern: str, m: int, n: int, dtype: torch.dtype, device: str, sparsity: float) -> str | None:
    if os.environ.get(PACK_VARIABLE) == "0":
        return f"{PACK_VARIABLE}=0"
    return packed.refusal(pattern, m, n, dtype, device, sparsity)


def notes_on(pair: Pair, options: BenchOptions) -> list[str]:
    """What a reader must know to read the figures."""
    notes = ["ratio = dense / sparse, the median of the pairs; above 1 sparse is faster or smaller"]
    if not pair.given:
        notes.append("the baseline holds the same weights as dense matrices, zeros included")
    stored = {str(entry.dtype).removeprefix("torch.") for entry in pair.dense.tensors.values()}
    if pair.given and stored != {pair.dtype}:
        names = ", ".join(sorted(stored))
        notes.append(f"the baseline is stored in {names} and runs in {pair.dtype}; files are compared as stored")
    if "onnx" in options.engine and pair.given:
        notes.append("onnx compares with the dense ONNX form of the same model, not with the given baseline")
    if "onnx" in options.engine and options.quantized:
        notes.append(
            "models named int8 and int4 round their weights: they are not lossless; MatMulNBits is what ONNX Runtime's "
            "quantizer makes of the dense form"
        )
    return notes


def busy_warnings(facts: dict[str, Any]) -> list[str]:
    """A sentence when other processes took part of the machine."""
    busy = max((facts[key] for key in ("busy_before", "busy_during") if facts[key] is not None), default=0.0)
    if busy <= machines.BUSY_CORES:
        return []
    return [
        f"the machine was not idle: other processes kept up to {busy:.1f} of its cores busy, so the figures are noisy; "
        "run again on an idle machine"
    ]


def kernel_warnings(engines: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence when models of ours were measured without our operators."""
    kernels = engines.get("onnx", {}).get("kernels", {})
    bodies = [side for side, kernel in kernels.items() if kernel == "body"]
    if not bodies:
        return []
    from sparse_rt.exporters.onnx import library

    reason = library.unavailable_reason() or "the session did not take them"
    return [
        f"ONNX Runtime ran the functions in the file in place of our operators ({', '.join(bodies)}), so these figures "
        f"say nothing about the operators: {reason}"
    ]


def judge(result: dict[str, Any], threshold: float | None) -> None:
    """Add ``fail_below`` and ``below`` to the result; nobody claims that sparse is faster than int4."""
    result["fail_below"] = threshold
    result["below"] = [
        f"{row_name(row)} {row['ratio']['median']:.2f}x"
        for row in result["rows"]
        if threshold is not None
        and row["phase"] in JUDGED
        and row["models"]["dense"] == SIDES[0]
        and row["ratio"]["median"] < threshold
    ]
