"""The short way to a model and its tokenizer, compressed or dense, from a folder or the hub."""

from __future__ import annotations

from pathlib import Path

from sparse_rt.checkpoint import Checkpoint, is_sparse_checkpoint, resolve_model
from sparse_rt.errors import UserError


def load(model: str | Path, *, dequantize: bool = False, revision: str | None = None, **options):
    """A ``PreTrainedModel`` of ``model`` (folder or hub id), in eval mode; compressed weights stay compressed.

    Its class is the one that config.json names (a causal language model, the head of an encoder, its body).

    ``dequantize`` expands them to ordinary ``nn.Linear``; ``options`` go to ``from_pretrained`` (``dtype``,
    ``device_map``, ...). Raises ``FormatError`` when a sparse-rt folder is damaged.
    """
    folder = resolve_model(model, revision)
    if is_sparse_checkpoint(folder):
        Checkpoint.open(folder)  # every cheap check first, so that damage is reported in our words
    from transformers import AutoConfig

    from sparse_rt.families import auto_class

    auto = auto_class(AutoConfig.from_pretrained(folder))
    loaded = auto.from_pretrained(folder, **{"dtype": "auto", **options})
    return (loaded.dequantize() if dequantize and hasattr(loaded, "hf_quantizer") else loaded).eval()


def load_generator(model: str | Path, **options):
    """``load`` of a model that generates text; ``UserError`` for an encoder."""
    loaded = load(model, **options)
    if not loaded.can_generate():
        raise UserError(
            f"{model} is a {type(loaded).__name__}, which predicts no next token; give a causal language model, or use "
            "this one through transformers"
        )
    return loaded


def load_tokenizer(model: str | Path, revision: str | None = None):
    """The tokenizer that lies beside the weights."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(model, revision))
