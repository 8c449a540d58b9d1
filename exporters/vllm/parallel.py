"""Which tensor-parallel sizes a model can be served with. vLLM itself stops with a bare ``AssertionError``.

Nothing here knows vLLM, so ``sparse-rt serve`` can ask before it starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sparse_rt.formats import get_format

# vLLM cuts these along their columns (row parallel), those along their rows (column parallel); q, k and v by heads.
BY_COLUMNS = {"o_proj", "out_proj", "down_proj", "fc2", "w2", "dense_4h_to_h", "c_proj", "wo"}
BY_ROWS = {"gate_proj", "up_proj", "fc1", "w1", "w3", "dense_h_to_4h", "c_fc"}
JOINED = {"gate_up_proj": 2}  # so many equal parts lie in one stored weight, each is cut by rows
EXPERTS = "experts"
LARGEST = 64


class Weight(NamedTuple):
    """Dense shape of a stored weight, and its pattern where it is compressed."""

    m: int
    n: int
    pattern: str | None = None


class Heads(NamedTuple):
    query: int
    key_value: int


def heads_of(config: Mapping[str, object] | object) -> Heads | None:
    """The attention heads that config.json (a mapping or an object of transformers) states."""

    def get(name: str):
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    query = get("num_attention_heads")
    return Heads(query, get("num_key_value_heads") or query) if isinstance(query, int) else None


def refusal(weights: Mapping[str, Weight], heads: Heads | None, size: int, expert_parallel: bool = False) -> str | None:
    """None, or the sentence that says why ``size`` ranks cannot share the weights and how many could."""
    if expert_parallel:
        weights = {name: weight for name, weight in weights.items() if EXPERTS not in name.split(".")}
    problem = next(_problems(weights, heads, size), None)
    if problem is None:
        return None
    fitting = [str(other) for other in range(1, LARGEST + 1) if not any(_problems(weights, heads, other))]
    return f"--tensor-parallel-size {size} does not fit: {problem}; sizes that do: {', '.join(fitting)}"


def _problems(weights: Mapping[str, Weight], heads: Heads | None, size: int) -> Iterator[str]:
    if heads is not None:
        query, key_value = heads
        if query % size:
            yield f"the model has {query} attention heads"
        if key_value % size and size % key_value:
            yield f"the model has {key_value} key-value heads, which are neither a multiple nor a divisor of {size}"
    for name, weight in weights.items():
        part = name.rpartition(".")[2]
        if part in BY_ROWS or part in JOINED:
            rows = weight.m // JOINED.get(part, 1)
            if rows % size:
                yield f"{name} has {rows} rows to share"
        elif part in BY_COLUMNS:
            if weight.n % size:
                yield f"{name} has {weight.n} columns to share"
            elif weight.pattern is not None:
                reason = get_format(weight.pattern).refuse_shape(weight.m, weight.n // size)
                if reason:
                    yield f"{name} is {weight.pattern}, and in the part of a rank {reason}"
