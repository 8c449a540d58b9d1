"""The class that a config.json names, and an empty model of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_rt.errors import UserError

# Where the class that a config names is looked for; the first is what a config that names none gets.
_TASKS = ("CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
_TASKS += ("MultipleChoice", "NextSentencePrediction", "PreTraining")


def auto_class(config: Any) -> type:
    """The class of transformers' Auto family that builds what ``config.architectures`` names.

    The body of an encoder is built as it is (``AutoModel``); that of a decoder with a head to predict tokens, because
    that is what its checkpoints are used for.
    """
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    autos = [getattr(transformers, f"AutoModelFor{task}") for task in _TASKS]
    for auto in autos:
        if named in _class_names(auto, config):
            return auto
    causal, masked = autos[:2]
    bare = named in _class_names(transformers.AutoModel, config)
    if bare and (_class_names(masked, config) or not _class_names(causal, config)):
        return transformers.AutoModel
    return causal


def predicts_next_token(config: Any) -> bool:
    """Whether ``auto_class`` builds a causal language model: not an encoder, not a classifier on a decoder."""
    import transformers

    return auto_class(config) is transformers.AutoModelForCausalLM


def _class_names(auto: type, config: Any) -> set[str]:
    """Names of the classes that ``auto`` makes from a config of this type."""
    if type(config) not in auto._model_mapping:
        return set()
    classes = auto._model_mapping[type(config)]
    return {one.__name__ for one in (classes if isinstance(classes, tuple | list) else (classes,))}


def empty_model(folder: str | Path) -> nn.Module:
    """The model that ``config.json`` describes on the meta device.

    Raises ``UserError`` when transformers does not know the architecture or has no class for it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        with torch.device("meta"):
            return auto_class(config).from_config(config)
    except (ValueError, KeyError, OSError, ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"transformers cannot build the model of {folder} ({reason}); convert works on language models that the "
            "Auto classes of transformers load"
        ) from error
