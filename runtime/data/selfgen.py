"""Texts that a model makes up itself, as token windows: calibration without any data.

Every text starts with the begin token, as training texts do; a model without one starts with a random token, as in
data-free quantization (LLM-QAT, arXiv 2305.17888). Tokens are drawn from the whole distribution at a temperature, no
top-k or top-p: the inputs of the linear layers then are those that the model itself takes for likely ("Self-calibration
for language model quantization and pruning", arXiv 2410.17170).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_rt.progress import Progress

BATCH = 8
# A model that ends its texts at once would be asked for thousands of them.
SHORTEST = 4  # as a share of the window: 1 / SHORTEST


def sample_windows(
    model: nn.Module, length: int, count: int, temperature: float, seed: int, progress: Progress | None = None
) -> Tensor:
    """int64 [count, length] cut from texts that ``model`` (a causal language model of transformers) writes, one stream.

    The same for the same ``seed``, model, device and number of threads; no state of torch's generators is changed.
    """
    progress = progress or Progress()
    first, ends = _special_tokens(model)
    devices = [model.device] if model.device.type == "cuda" else []
    stream, windows = [], []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        for _ in progress.track(range(count), "sampling calibration text", total=count):
            while len(stream) < length:
                for text in _texts(model, length, min(BATCH, count), temperature, first, ends):
                    stream += text
            windows.append(torch.tensor(stream[:length]))
            stream = stream[length:]
    return torch.stack(windows)


def _texts(
    model: nn.Module, length: int, batch: int, temperature: float, first: int | None, ends: list[int]
) -> list[list[int]]:
    from transformers import GenerationConfig

    vocabulary = model.get_input_embeddings().num_embeddings
    start = torch.randint(vocabulary, (batch, 1)) if first is None else torch.full((batch, 1), first)
    # In place of the model's own: what is None in the config given to generate() would be taken from there.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        min_new_tokens=(length - 1) // SHORTEST,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    start = start.to(model.device)
    written = model.generate(start, attention_mask=torch.ones_like(start)).tolist()
    return [_until_end(tokens, ends) for tokens in written]


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """``tokens`` to the first end token after the start, with it unless the next text begins with the same one."""
    stop = next((place for place, token in enumerate(tokens) if place and token in ends), len(tokens) - 1)
    return tokens[:stop] if tokens[stop] in ends and tokens[stop] == tokens[0] else tokens[: stop + 1]


def _special_tokens(model: nn.Module) -> tuple[int | None, list[int]]:
    """(begin token or None, end tokens), of the generation config or of the model's."""
    configs = (model.generation_config, model.config)
    first, end = (
        next((found for config in configs if (found := getattr(config, name, None)) is not None), None)
        for name in ("bos_token_id", "eos_token_id")
    )
    return first, [end] if isinstance(end, int) else list(end or [])
