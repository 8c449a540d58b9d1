"""The README.md of a converted model: what was done to it, how to load and serve it, what happens without sparse-rt."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from sparse_rt.checkpoint import SparseConfig

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
CAUSAL = "AutoModelForCausalLM"
# What the hub calls the task of a class; the bodies of models have none.
PIPELINES = {
    CAUSAL: "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_BODY = """# {title}

A sparse model in the sparse-rt format (`pip install sparse-rt`): the linear weights are stored as
kept values and positions, on disk and in memory.

| | |
|---|---|
{facts}

## Load

```python
import sparse_rt  # registers the format with transformers
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Without `import sparse_rt`, transformers stops with "no file named model.safetensors": the weight files carry names of
their own, so that nothing loads a model with random weights by mistake.

## Serve

{serve}

## Left dense

{skipped}
"""


_SERVE = """```
vllm serve {name}
```

needs `pip install "sparse-rt[vllm]"`; vLLM then finds the format by itself. `sparse-rt export --to dense` writes an
ordinary dense model for any other engine, `sparse-rt verify` checks every file and tensor against the manifest."""

_SERVE_WRAPPED = """Every compressed weight is the core of a product with two block-diagonal matrices; transformers
runs it as it is. For vLLM and other engines `sparse-rt export --to dense` multiplies the three: an ordinary model,
without zeros and as large as the one that this was made from. `sparse-rt verify` checks every file and tensor against
the manifest."""


_NOT_SERVED = """`sparse-rt export --to dense` writes an ordinary dense model for any other engine, `sparse-rt verify`
checks every file and tensor against the manifest."""


def model_card(facts: dict[str, Any], source: Path, config: SparseConfig, auto: str = CAUSAL) -> str:
    """Markdown with the metadata block of the hub. ``facts`` is the result of the conversion, ``auto`` what loads it.

    Licence and language are taken over from the card of the source model, when it has one.
    """
    from huggingface_hub import ModelCardData

    origin = facts["source"]["model"]
    inherited = _inherited(source)
    base = origin if _HUB_ID.fullmatch(origin) and not Path(origin).exists() else inherited.pop("base_model", None)
    inherited.pop("base_model", None)
    tags = ["sparse-rt", "sparsity", f"pattern:{config.pattern}"]
    if auto in PIPELINES:
        inherited.setdefault("pipeline_tag", PIPELINES[auto])
    data = ModelCardData(base_model=base, tags=tags, library_name="transformers", **inherited)
    name = f"{Path(origin).name}-{config.pattern.replace(':', '-')}"
    serve = _SERVE_WRAPPED if config.wrapper is not None else _SERVE if auto == CAUSAL else _NOT_SERVED
    parts = dict(facts=_facts(facts, config), skipped=_skipped(facts["skipped"]), auto=auto)
    body = _BODY.format(title=name, name=f"path/to/{name}", serve=serve.format(name=f"path/to/{name}"), **parts)
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def derived_card(source: Path, body: str, config: SparseConfig) -> str:
    """Markdown ``body`` with a metadata block; licence and language are those of the sparse-rt folder ``source``."""
    from huggingface_hub import ModelCardData

    inherited = _inherited(source)
    inherited.setdefault("pipeline_tag", "text-generation")
    tags = ["sparse-rt", "sparsity", f"pattern:{config.pattern}", f"values:{config.values}"]
    return f"---\n{ModelCardData(tags=tags, library_name='transformers', **inherited).to_yaml()}\n---\n\n{body}"


def _facts(facts: dict[str, Any], config: SparseConfig) -> str:
    options, source = facts["options"], facts["source"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    rows = {
        "made from": f"`{Path(source['model']).name if Path(source['model']).exists() else source['model']}`{revision}",
        "pattern": config.pattern,
        **{f"pattern of `{name}`": override.pattern for name, override in config.overrides.items()},
        "method": "none (the source was pruned already)" if options["method"] == "none" else options["method"],
        **({"masks": "transposable: N of M in columns too"} if options.get("transposable") else {}),
        **({} if config.wrapper is None else {"wrapper": config.wrapper}),
        "sparsity of the compressed weights": f"{facts['mean_sparsity']:.4f}",
        "linear weights compressed": f"{facts['coverage_percent']:.2f}% of their bytes",
        "size": f"{facts['compressed_bytes']:,} bytes, {facts['ratio']:.3f} of the dense {facts['dense_bytes']:,}",
    }
    if "ratios" in facts:
        found = [block["sparsity"] for block in facts["ratios"]["blocks"].values()]
        rows["ratios"] = (
            f"OWL (lambda {options['owl_lambda']:g}, threshold {options['owl_threshold']:g}): sparsity of the blocks "
            f"{min(found):.4f} to {max(found):.4f}"
        )
    if "dataset" in options:
        data = Path(options["dataset"]).name if Path(options["dataset"]).exists() else options["dataset"]
        if "self_temperature" in options:
            data = f"the model's own samples (temperature {options['self_temperature']:g})"
        rows["calibration"] = (
            f"{options['num_samples']} sequences of {options['max_seq_len']} tokens from {data}, seed {options['seed']}"
        )
        rows["mean reconstruction error"] = f"{facts['mean_reconstruction_error']:.4f} (relative, of a layer's output)"
    if "block_error" in facts:
        before, after = (f"{facts[f'mean_block_error_{when}']:.4f}" for when in ("before", "after"))
        rows["reconstruction"] = (
            f"{options['reconstruct']} steps a block; mean error of a block's output {before} -> {after} (relative)"
        )
    rows["made by"] = str(config.producer)
    return "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def _skipped(skipped: list[dict[str, Any]]) -> str:
    """One line a reason; single modules by name, many of them by number."""
    if not skipped:
        return "No linear weight was left dense."
    counts = Counter(entry["reason"] for entry in skipped)
    lines = []
    for reason, count in counts.items():
        names = [entry["name"] for entry in skipped if entry["reason"] == reason]
        shown = ", ".join(f"`{name}`" for name in names[:4]) + (f" and {count - 4} more" if count > 4 else "")
        lines.append(f"- {shown}: {reason}")
    return "\n".join(lines)


def _inherited(source: Path) -> dict[str, Any]:
    """What the card of the source says and stays true."""
    from huggingface_hub import ModelCard

    path = source / "README.md"
    if not path.is_file() or not path.read_text(errors="replace").startswith("---"):
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card is free text; a broken one must not stop a conversion
        return {}
    return {key: data[key] for key in (*INHERITED, "base_model") if key in data}
