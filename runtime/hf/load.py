"""The short way to a model and its tokenizer, compressed or dense, from a folder or the hub."""

from __future__ import annotations

from pathlib import Path

from sparse_rt.checkpoint import Checkpoint, is_sparse_checkpoint, resolve_model


def load(model: str | Path, *, dequantize: bool = False, revision: str | None = None, **options):
    """A ``PreTrainedModel`` of ``model`` (folder or hub id), in eval mode; compressed weights stay compressed.

    ``dequantize`` expands them to ordinary ``nn.Linear``; ``options`` go to ``from_pretrained`` (``dtype``,
    ``device_map``, ...). Raises ``FormatError`` when a sparse-rt folder is damaged.
    """
    folder = resolve_model(model, revision)
    if is_sparse_checkpoint(folder):
        Checkpoint.open(folder)  # every cheap check first, so that damage is reported in our words
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})
    return (loaded.dequantize() if dequantize and hasattr(loaded, "hf_quantizer") else loaded).eval()


def load_tokenizer(model: str | Path, revision: str | None = None):
    """The tokenizer that lies beside the weights."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(model, revision))
