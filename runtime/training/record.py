"""What a finished adapter folder says about itself: model card, run file, loss curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_rt.adapters.registry import get_adapter
from sparse_rt.optional import available
from sparse_rt.report import duration, size, write_json

_CARD = """# {title}

An adapter for the sparse model `{base}`, trained on its compressed weights with sparse-rt.
{promise}

| | |
|---|---|
{facts}

## Use

```python
import sparse_rt  # makes the adapter known to PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/{title}", dtype="auto")
```

```
sparse-rt merge {base} path/to/{title} -o {title}-merged
```

folds it into the compressed values and proves mask and logits first. `run.yaml` repeats the training,
`trainer_state.json` holds its log, `metrics.json` the figures above.
"""


def write_card(folder: Path, title: str, base: str, result: dict[str, Any]) -> None:
    """README.md with the metadata block that PEFT adapters carry on the hub."""
    from huggingface_hub import ModelCardData

    tags = ["sparse-rt", "sparsity", result["adapter"]]
    hub_id = None if Path(base).is_dir() else base  # a folder of this machine means nothing to another reader
    name = hub_id or Path(base).name
    data = ModelCardData(base_model=hub_id, library_name="peft", tags=tags, pipeline_tag="text-generation")
    facts = {
        "adapter": result["adapter"],
        "trainable parameters": f"{result['trainable_parameters']:,}",
        "data": result["dataset"],
        "steps": f"{result['steps']:,} ({result['rows']:,} rows)",
        "loss": f"{result['first_loss']:.4f} over the first tenth of the log, {result['last_loss']:.4f} over the last",
        **_evaluation(result),
        **_previous(result),
        "training time": f"{duration(result['seconds'])} on {result['device']}",
        "tokens a second": f"{result['tokens_per_second']:.0f}",
        "peak memory": size(result["peak_memory_bytes"]),
        "base weights (sha256)": f"`{result['base_digest']}`",
    }
    promise = get_adapter(result["adapter"]).promise
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    (folder / "README.md").write_text(
        f"---\n{data.to_yaml()}\n---\n\n{_CARD.format(title=title, base=name, facts=table, promise=promise)}"
    )


def _evaluation(result: dict[str, Any]) -> dict[str, str]:
    if "eval_loss" not in result:
        return {}
    rows = f"{result['eval_rows']:,} rows that were not trained on"
    return {"evaluation loss": f"{result['eval_loss_before']:.4f} before, {result['eval_loss']:.4f} after, on {rows}"}


def write_metrics(folder: Path, result: dict[str, Any]) -> None:
    """metrics.json: every figure of the run, as the workflow returns them."""
    write_json(folder / "metrics.json", result)


def _previous(result: dict[str, Any]) -> dict[str, str]:
    if result.get("previous") is None:
        return {}
    return {"goes on from": f"`{Path(result['previous']).name}` (sha256 `{result['previous_digest']}`)"}


def write_run_file(folder: Path, options: dict[str, Any]) -> None:
    """run.yaml: every option of the run with its value, as ``--config`` reads it."""
    import yaml

    (folder / "run.yaml").write_text(yaml.safe_dump(options, sort_keys=False))


def write_loss_curve(folder: Path, losses: list[tuple[int, float]], eval_losses: list[tuple[int, float]] = ()) -> bool:
    """loss.png, when matplotlib is installed; says whether it was."""
    if not available("matplotlib"):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*losses, strict=True), color="#3b6ea5", linewidth=1.2, label="training")
    if eval_losses:
        axes.plot(*zip(*eval_losses, strict=True), color="#c0504d", marker=".", linewidth=1.2, label="evaluation")
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=130)
    return True


_MERGED_CARD = """# {title}

The sparse model `{base}` with the {kind} adapter `{adapter}` folded into its kept values. {mask}
{weights} compressed weights, pattern {pattern}.

```python
import sparse_rt  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/{title}")
tokenizer = AutoTokenizer.from_pretrained("path/to/{title}")
```

Without `import sparse_rt`, transformers stops with "no file named model.safetensors". `vllm serve path/to/{title}`
needs `pip install "sparse-rt[vllm]"`; `sparse-rt export --to dense` writes an ordinary dense model. The manifest
(`sparse_rt.manifest.json`) holds the digests of the base model's manifest, of the adapter and of every tensor.
"""


_MASK = {
    False: "The mask is that of the base model, byte for byte:",
    True: "The mask keeps as many weights as that of the base model, {moved} of them elsewhere:",
}


def write_merged_card(folder: Path, title: str, checkpoint, about: dict[str, Any], adapter, moved: int) -> None:
    """README.md of a merged model; licence, language and tags are those of the base model's card."""
    from huggingface_hub import ModelCard, ModelCardData

    source = about["source"]
    inherited: dict[str, Any] = {}
    if (checkpoint.folder / "README.md").is_file():
        try:
            inherited = ModelCard.load(checkpoint.folder / "README.md", ignore_metadata_errors=True).data.to_dict()
        except Exception:  # a card is free text; a broken one must not stop a merge
            inherited = {}
    pattern = checkpoint.quantization.pattern
    inherited.setdefault("tags", ["sparse-rt", "sparsity", f"pattern:{pattern}"])
    inherited |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    body = _MERGED_CARD.format(
        title=title,
        base=Path(source["model"]).name,
        kind=adapter.adapter.name,
        adapter=Path(source["adapter"]).name,
        mask=_MASK[moved > 0].format(moved=f"{moved:,}"),
        weights=len(checkpoint.weights),
        pattern=pattern,
    )
    (folder / "README.md").write_text(f"---\n{ModelCardData(**inherited).to_yaml()}\n---\n\n{body}")
