"""End to end: a Hugging Face Llama of the size of Llama-3-8B with random weights, static cache, CUDA graphs.

The dense model, and the same model with every linear layer of its blocks pruned and packed. A decode step is one CUDA
graph of the whole model; dense and sparse steps take turns. ``generate`` is called as a user would, with the model's
forward replaced by the replay of that graph for single tokens. Before anything is timed, the logits of the sparse model
after a prompt and a few decode steps are compared with those of the dense model with the same pruned weights; both are
bfloat16 throughout, so they differ by the rounding of all layers.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch
from gpu_common import Cell, Context, Row, Task, Wrong, random_mask, rms
from gpu_timing import turn_on_cpu, turn_on_gpu
from timing import ratio, spread
from torch import Tensor, nn

from sparse_rt.kernels import scratch
from sparse_rt.nn import SparseLinear

MODEL = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
DRY_MODEL = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
CELLS = (Cell("2:4", 0.5), Cell("unstructured", 0.75), Cell("unstructured", 0.5), Cell("unstructured", 0.9))
BATCHES, PROMPT, NEW_TOKENS, PREFILL = (1, 4, 16), 512, 128, 2048
DRY_BATCHES, DRY_PROMPT, DRY_NEW, DRY_PREFILL = (1,), 4, 3, 8
STEPS = 4  # decode steps before the logits are compared
# Relative RMS difference of logits of two bfloat16 models of equal weights. A wrong layer gives about 1.
MAX_DIFFERENCE = 0.1


def tasks(context: Context) -> list[Task]:
    """One task, because all cells share the dense model."""
    return [Task("generate", measure)]


def measure(context: Context) -> None:
    fields = {"kind": "generate", "model": "Llama-3-8B shape, random weights"}
    with torch.no_grad():
        model = random_model(context)
        layers = dict(linears(model))
        for cell in CELLS[:1] if context.dry else CELLS:
            if context.late():
                context.emit({**fields, **cell.fields, "kind": "skipped", "reason": "time"})
                continue
            named = {**fields, **cell.fields}
            context.attempt(named, functools.partial(one_cell, context, model, layers, cell, named))
            swap(model, layers)


def random_model(context: Context) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(DRY_MODEL if context.dry else MODEL), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(context.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)
    model.generation_config.eos_token_id = None  # a random model would stop anywhere
    return model.requires_grad_(False)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Those of the blocks; the head stays dense, as in conversions."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            yield name, module


def swap(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, module in layers.items():
        model.set_submodule(name, module)


def one_cell(context: Context, model: nn.Module, dense: dict[str, nn.Linear], cell: Cell, fields: Row) -> Iterator[Row]:
    """Rows of one cell: generation per batch, then prefill and memory."""
    sparse = {}
    for name, linear in dense.items():
        mask = random_mask(cell, *linear.weight.shape, context.device)
        sparse[name] = SparseLinear.from_dense(linear, cell.pattern, mask).eval()
    difference = compare(context, model, dense, sparse)
    if not difference <= MAX_DIFFERENCE:
        raise Wrong(f"logits differ from the dense model with the same weights by {difference:.3g} (relative RMS)")
    for layer in sparse.values():
        if not layer.is_packed and layer.pack_refusal() is None:
            layer.pack()
    facts = {
        "logits_difference": difference,
        "packed_layers": sum(layer.is_packed for layer in sparse.values()),
        "layers": len(sparse),
        "linear_bytes": {
            "dense": sum(linear.weight.nbytes for linear in dense.values()),
            "sparse": sum(layer.weight_nbytes for layer in sparse.values()),
        },
    }
    others = sum(
        p.nbytes for n, p in model.named_parameters() if n.startswith(("lm_head", "model.embed", "model.norm"))
    )
    facts["weight_bytes"] = {name: size + others for name, size in facts["linear_bytes"].items()}
    sets = {"dense": dense, "sparse": sparse}
    for batch in DRY_BATCHES if context.dry else BATCHES:
        yield {**facts, **decode(context, model, sets, batch), "batch": batch}
        if context.late():
            return
    yield {**facts, **prefill(context, model, sets), "kind": "prefill model"}


def compare(context: Context, model: nn.Module, dense: dict[str, nn.Linear], sparse: dict[str, SparseLinear]) -> float:
    """Relative RMS difference of the logits of the sparse and the pruned dense model."""
    ids = torch.randint(1, model.config.vocab_size, (1, DRY_PROMPT if context.dry else 64), device=context.device)
    logits = []
    for layers in (sparse, {name: layer.to_dense() for name, layer in sparse.items()}):
        swap(model, layers)
        cache = new_cache(model, ids.shape[1] + STEPS)
        found = [model(input_ids=ids, past_key_values=cache, use_cache=True).logits]
        for step in range(STEPS):
            token = (ids[:, step : step + 1] + 1) % model.config.vocab_size
            position = torch.full((1, 1), ids.shape[1] + step, device=ids.device)
            found.append(model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits)
        logits.append(torch.cat(found, 1))
    return rms(*logits)


def new_cache(model: nn.Module, length: int):
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=length)


class Decoder:
    """One decode step of the model with its present layers: a CUDA graph where there is a GPU."""

    def __init__(self, context: Context, model: nn.Module, batch: int, prompt: int, new: int):
        self.model, self.device, self.count = model, context.device, 1
        self.forward = model.forward  # that of the class
        # Timing writes tokens beyond those that are generated; the cache must have room for all of them.
        self.cache = new_cache(model, prompt + new)
        self.ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=context.device)
        self.token, self.position = self.ids[:, :1].clone(), torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.rewind()
        if context.device.type == "cuda":
            self.capture()

    def rewind(self) -> None:
        """The cache holds the prompt again."""
        self.cache.reset()
        self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.position.fill_(self.ids.shape[1])

    def step(self) -> Tensor:
        outputs = self.forward(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True
        )
        return outputs.logits

    def capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step()
        self.rewind()

    def run(self) -> None:
        """One step, as timed."""
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def generate(self, new: int) -> tuple[float, Tensor]:
        """Seconds of ``model.generate`` from the prompt on, and the tokens."""
        self.cache.reset()
        if self.graph is not None:
            # generate() looks at the signature of forward.
            self.model.forward = functools.wraps(self.forward)(lambda *args, **given: self._replay(*args, **given))
        try:
            start = time.perf_counter()
            tokens = self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                past_key_values=self.cache,
                max_new_tokens=new,
                do_sample=False,
                disable_compile=True,
            )
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start, tokens
        finally:
            self.model.__dict__.pop("forward", None)

    def _replay(self, input_ids: Tensor, **given):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if input_ids.shape[1] != 1:
            outputs = self.forward(input_ids=input_ids, **given)
            self.position.fill_(input_ids.shape[1])
            return outputs
        self.token.copy_(input_ids)
        self.graph.replay()
        self.position.add_(1)
        return CausalLMOutputWithPast(logits=self.logits, past_key_values=self.cache)


def decode(context: Context, model: nn.Module, sets: dict[str, dict[str, nn.Module]], batch: int) -> Row:
    """Milliseconds of a decode step in turns, and what ``generate`` makes of it."""
    prompt, new = (DRY_PROMPT, DRY_NEW) if context.dry else (PROMPT, NEW_TOKENS)
    turns = 3 if context.dry else 40
    decoders, speeds = {}, {}
    for name, layers in sets.items():
        swap(model, layers)
        decoders[name] = Decoder(context, model, batch, prompt, max(new, turns + 2) + 4)
        decoders[name].generate(2)  # warm
        seconds, tokens = decoders[name].generate(new)
        if tokens.shape != (batch, prompt + new):
            raise Wrong(f"generate returned {tuple(tokens.shape)}, expected {(batch, prompt + new)}")
        speeds[name] = batch * new / seconds
        decoders[name].rewind()
    turn = turn_on_gpu if context.device.type == "cuda" else turn_on_cpu
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for index in range(turns):
        for name, took in turn(decoders, sorted(decoders, reverse=bool(index % 2))).items():
            times[name].append(took)
    times = {name: taken[1:] for name, taken in times.items()}
    return {
        "prompt": prompt,
        "new_tokens": new,
        "ms": {name: spread(taken, 1e3) for name, taken in times.items()},
        "ratio": ratio(times["dense"], times["sparse"]),
        "generate_tokens_per_second": {name: round(speed, 2) for name, speed in speeds.items()},
        "turns": len(times["dense"]),
    }


def prefill(context: Context, model: nn.Module, sets: dict[str, dict[str, nn.Module]]) -> Row:
    """A prompt without cache, eagerly; and the most memory it takes, weights of the model included."""
    length = DRY_PREFILL if context.dry else PREFILL
    ids = torch.randint(1, model.config.vocab_size, (1, length), device=context.device)
    calls: dict[str, Callable[[], object]] = {}
    peaks, on_gpu = {}, context.device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in sets}
    for index in range(2 if context.dry else 6):
        for name, layers in sets.items():
            swap(model, layers)
            calls[name] = functools.partial(model, input_ids=ids, use_cache=False, logits_to_keep=1)
            if on_gpu:
                scratch.release()
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                calls[name]()  # allocates scratch again, outside of the time
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() - before
            start = time.perf_counter()
            calls[name]()
            if on_gpu:
                torch.cuda.synchronize()
            if index:
                times[name].append(time.perf_counter() - start)
    return {
        "tokens": length,
        "ms": {name: spread(taken, 1e3) for name, taken in times.items()},
        "ratio": ratio(times["dense"], times["sparse"]),
        "peak_bytes_beyond_weights": peaks or None,
        "turns": len(times["dense"]),
    }
