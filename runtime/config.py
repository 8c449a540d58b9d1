"""Options of every command: the flag, the YAML key, the default and the help text from one source.

Torch-free on purpose: the command line builds its help from these classes.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sparse_rt.errors import UserError


class Options(BaseModel):
    """Base of all option classes; unknown names are refused with the known ones."""

    model_config = ConfigDict(extra="forbid", validate_default=False)

    @classmethod
    def build(cls, **values: Any):
        """Validate ``values``; ``UserError`` in one sentence for the first problem."""
        try:
            return cls(**values)
        except ValidationError as error:
            problem = error.errors()[0]
            name = "".join(str(part) for part in problem["loc"]) or cls.__name__
            if problem["type"] == "extra_forbidden":
                raise UserError(f"unknown option {name!r}; known are {', '.join(sorted(cls.model_fields))}") from error
            message = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix to a message of ours
            raise UserError(f"option {name}: {message} (got {problem['input']!r})") from error


def parse_size(text: str | int) -> int:
    """ "5GB", "500MB", "200kB" or a number of bytes -> bytes (decimal units, as transformers)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)i?B?\s*", str(text))
    if not match:
        raise UserError(f"{text!r} is not a size; write for example 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2].replace("K", "k") or " "))


def check_pattern(pattern: Any) -> Any:
    """YAML reads an unquoted 2:4 as the integer 124 (base 60); refuse it with the remedy."""
    if isinstance(pattern, int | float):
        raise UserError(
            f"pattern {pattern!r} is a number; YAML reads an unquoted 2:4 as 124, write it in quotes: pattern: '2:4'"
        )
    return pattern


class ConvertOptions(Options):
    model: str
    output_dir: Path
    pattern: str = Field(
        "2:4",
        description="2:4, N:M (N kept of M columns) or unstructured; auto, the default of --method none, finds for "
        "each weight which of them its zeros obey",
    )
    sparsity: float = Field(0.5, description="fraction of zeros for unstructured")
    method: str = Field(
        "magnitude",
        description="none (already pruned), magnitude, wanda, ria, sparsegpt, admm, alps or armor; repaired with "
        "+dsnot, +admm or +pcg",
    )
    transposable: bool = Field(
        False, description="N:M: as many kept in every column of M x M blocks as in every row, so that W^T is N:M too"
    )
    ratios: Literal["uniform", "owl"] = Field(
        "uniform", description="how much goes in each decoder block: uniform, or owl (less where outliers are many)"
    )
    owl_lambda: float | None = Field(
        None, gt=0, description="owl: half of the range of the blocks' sparsity; default 0.08, for N:M 0.125 (1 of 8)"
    )
    owl_threshold: float | None = Field(
        None, gt=0, description="owl: a score this many times the mean of its block is an outlier; default 5, for N:M 6"
    )
    wrapper_block: int | None = Field(
        None, ge=1, description="armor: largest block of the wrapper; default: a 32nd of a weight's smaller side"
    )
    dataset: str | None = Field(
        None, description="calibration text: .txt, .jsonl, folder, hub data set, or self: what the model itself writes"
    )
    self_temperature: float | None = Field(
        None, gt=0, description="temperature at which --dataset self samples; default 1"
    )
    num_samples: int = Field(128, ge=1, description="calibration sequences")
    max_seq_len: int = Field(2048, ge=1, description="tokens of a calibration sequence")
    seed: int = Field(0, description="chooses the calibration sequences")
    permute: bool = Field(
        False, description="N:M: input channels in an order that hurts less, as RIA does; the model computes the same"
    )
    reconstruct: int = Field(
        0, ge=0, description="steps that train each block's kept weights to give the dense block's output; 0: none"
    )
    reconstruct_learning_rate: float = Field(
        0.02, gt=0, description="learning rate of --reconstruct, as a share of the size (RMS) of a weight's kept values"
    )
    ignore: list[str] = Field(["lm_head"], description="modules left dense: a name, its last parts, or re:PATTERN")
    overrides: dict[str, str] = Field({}, description="modules with another pattern, as NAME=PATTERN")
    dtype: str = Field("auto", description="dtype of the stored values: auto, bfloat16, float16, float32")
    device: str = Field("auto", description="where to prune: auto, cpu, cuda")
    max_shard_size: str = Field("5GB", description="largest weight file")
    revision: str | None = Field(None, description="hub revision of the source")
    offload_activations: bool = Field(
        False,
        description="keep the activations of the calibration sequences in a file beside the output, not in memory",
    )
    resume: bool = Field(False, description="go on with an interrupted conversion")
    dry_run: bool = Field(False, description="say what would be done, read headers only")
    overwrite: bool = Field(False, description="replace a non-empty output folder")

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern(cls, value):
        return check_pattern(value)

    @model_validator(mode="after")
    def _default_of_none(self):
        if self.method == "none" and "pattern" not in self.model_fields_set:
            self.pattern = "auto"
        return self

    @field_validator("overrides", mode="before")
    @classmethod
    def _overrides(cls, value):
        if isinstance(value, dict):
            for pattern in value.values():
                check_pattern(pattern)
        return value

    @field_validator("sparsity")
    @classmethod
    def _sparsity(cls, value):
        if not (math.isfinite(value) and 0 <= value < 1):
            raise ValueError("sparsity is a fraction from 0 up to (not including) 1; 0.5 removes half of the weights")
        return value


class InspectOptions(Options):
    model: str
    plot: Path | None = Field(None, description="write a bar chart of the sparsity per weight")


class VerifyOptions(Options):
    model: str
    against: str | None = Field(None, description="another model whose masks and values are compared")


class FinetuneOptions(Options):
    """``trainer`` holds the names of transformers' ``TrainingArguments`` as they are."""

    model: str
    output_dir: Path
    adapter: str = Field("spp", description="spp, masklora, seft, values or dcft")
    dataset: str | None = Field(None, description="training data: .jsonl, .txt, a folder or a hub data set")
    max_seq_len: int = Field(512, ge=2, description="tokens of a training sequence")
    completion_only: bool = Field(False, description="learn the answers only, not the prompts")
    packing: bool = Field(False, description="several texts in one sequence; none attends to another")
    eval_dataset: str | None = Field(None, description="data to evaluate on, before, during and after training")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="share of the data set aside to evaluate on")
    adapter_options: dict[str, Any] = Field({}, description="options of the adapter's config, such as groups or r")
    trainer: dict[str, Any] = Field({}, description="transformers TrainingArguments by name")
    previous: str | None = Field(
        None, description="earlier adapter of the same base to go on from; dcft also keeps its map near that one's"
    )
    teacher: str | None = Field(
        None, description="dense model to learn from too: the one before pruning, a folder or id"
    )
    teacher_cache: Path | None = Field(
        None, description="folder for the teacher's outputs, computed once; then no teacher is in memory"
    )
    teacher_top_k: int = Field(64, ge=1, description="likeliest tokens a position that a teacher cache keeps")
    distill: Literal["kl", "squarehead", "both"] | None = Field(
        None, description="learn the teacher's predictions (kl, the default), hidden states (squarehead) or both"
    )
    kl_weight: float | None = Field(None, ge=0, description="weight of KL; default: 1 where --distill names it")
    squarehead_weight: float | None = Field(
        None, ge=0, description="weight of SquareHead; default: 1 where --distill names it"
    )
    ce_weight: float = Field(1.0, ge=0, description="weight of the labels' own loss beside a teacher")
    temperature: float = Field(1.0, gt=0, description="temperature of KL")
    seed: int = Field(0, description="data order and adapter initialisation")
    revision: str | None = Field(None, description="hub revision of the model")
    resume: bool = Field(False, description="go on from the last checkpoint of the output folder")
    overwrite: bool = Field(False, description="replace a non-empty output folder")


class MergeOptions(Options):
    model: str
    adapter: str
    output_dir: Path
    dtype: str = Field("auto", description="dtype of the merged values: auto, bfloat16, float16, float32")
    verify: bool = Field(True, description="prove mask and logits before anything is written")
    max_shard_size: str = Field("5GB", description="largest weight file")
    overwrite: bool = Field(False, description="replace a non-empty output folder")


class ExportOptions(Options):
    model: str
    output_dir: Path
    to: str = Field(description="vllm, onnx, dense, int8 or compressed-tensors")
    check: bool = Field(False, description="load the result in its engine and compare with this model")
    options: dict[str, Any] = Field({}, description="options of the exporter")
    overwrite: bool = Field(False, description="replace a non-empty output folder")


class EvalOptions(Options):
    model: str
    dataset: str | None = Field(None, description="text file for perplexity; default: the shipped held-out text")
    max_seq_len: int = Field(2048, ge=2, description="context length of perplexity")
    max_samples: int | None = Field(
        None, ge=1, description="windows (perplexity) or documents a task (lm-eval) at most"
    )
    tasks: str | None = Field(None, description="lm-evaluation-harness tasks, comma separated, instead of perplexity")
    device: str = Field("auto", description="auto, cpu or cuda")
    revision: str | None = None


class GenerateOptions(Options):
    model: str
    prompt: str = Field(description="text to continue")
    max_new_tokens: int = Field(64, ge=1, description="tokens to add, chosen greedily")
    engine: Literal["hf", "onnx"] = Field("hf", description="onnx: MODEL is a folder made by export --to onnx")
    device: str = Field("auto", description="auto, cpu or cuda; onnx runs on the CPU")
    revision: str | None = None


BenchPhase = Literal["disk", "load", "memory", "prefill", "decode", "train", "serve"]
BENCH_PHASES: tuple[str, ...] = get_args(BenchPhase)
# Two servers, and requests that arrive over minutes: measured where it is asked for.
ASKED_PHASES = ("serve",)


class BenchOptions(Options):
    model: str
    baseline: str | None = Field(None, description="dense model to compare with; default: this model, decompressed")
    phase: list[BenchPhase] = Field(
        [], description="what to measure (repeatable); default: all but serve, OpenAI servers under load (vllm)"
    )
    engine: list[Literal["hf", "vllm", "onnx"]] = Field(
        ["hf"], min_length=1, description="what runs the models (repeatable)"
    )
    batch: list[int] = Field([1], description="sequences at once (repeatable)")
    prompt_tokens: int = Field(128, ge=1, description="tokens of prefill")
    new_tokens: int = Field(32, ge=2, description="tokens of decode")
    train_tokens: int = Field(256, ge=2, description="tokens of a training step")
    request_rate: list[float] = Field(
        [1.0, 4.0, math.inf], min_length=1, description="requests a second of serve (repeatable); inf: all at once"
    )
    compile: bool = Field(
        False, description="vllm on a CPU: compile the models first, as vLLM does by default; a minute a start"
    )
    num_prompts: int = Field(32, ge=1, description="requests of serve in each repetition")
    quantized: bool = Field(
        True, description="onnx: compare also with int8 and int4 weights, quantized by ONNX Runtime (MatMulNBits)"
    )
    repeats: int = Field(5, ge=1, description="interleaved repetitions; the median counts")
    device: str = Field("auto", description="device of the hf engine: auto, cpu, cuda")
    report: Path | None = Field(None, description="folder for report.json, report.md and report.png")
    fail_below: float | None = Field(
        None, gt=0, description="exit 3 when a prefill/decode/train speed-up is below this"
    )
    overwrite: bool = Field(False, description="replace a non-empty report folder")

    @field_validator("batch")
    @classmethod
    def _batch(cls, value):
        if not value or min(value) < 1:
            raise ValueError("batch is a number of sequences, at least 1")
        return value

    @field_validator("request_rate")
    @classmethod
    def _request_rate(cls, value):
        if not all(rate > 0 for rate in value):  # false for nan, too
            raise ValueError("a request rate is a number of requests a second above 0, or inf")
        return value


class DemoOptions(Options):
    output_dir: Path
    steps: int = Field(60, ge=1, description="fine-tuning steps")
    skip: list[str] = Field([], description="stages to leave out: vllm, onnx")
    overwrite: bool = Field(False, description="replace a non-empty output folder")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A run file as a dictionary; ``UserError`` when it is missing or not a mapping."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold 'key: value' lines, got {type(data).__name__}")
    if "pattern" in data:
        check_pattern(data["pattern"])
    return data


def parse_assignments(assignments: list[str], text: bool = False) -> dict[str, Any]:
    """["learning_rate=2e-5", ...] -> dictionary; values are read as YAML, "2e-5" as the number it looks like.

    With ``text`` every value stays the text it is.
    """
    import yaml

    parsed: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise UserError(f"{assignment!r}: write KEY=VALUE")
        parsed[name.strip()] = value.strip() if text else number(yaml.safe_load(value) if value else "")
    return parsed


def number(value: Any) -> Any:
    """Text that is a number (YAML leaves 2e-5 as text) becomes one."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
