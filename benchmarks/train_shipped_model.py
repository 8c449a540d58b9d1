"""Train the small Llama that ships with sparse-rt (`sparse_rt.assets`) on the source of the Python standard library.

    python benchmarks/train_shipped_model.py prepare  --work WORK          # corpus, text files, tokenizer
    python benchmarks/train_shipped_model.py train    --work WORK          # WORK/checkpoint.pt; --resume continues
    python benchmarks/train_shipped_model.py export   --work WORK          # bf16 model folder
    python benchmarks/train_shipped_model.py evaluate --work WORK          # held-out perplexities as JSON
    python benchmarks/train_shipped_model.py digests                       # SHA256SUMS

The corpus is the standard library of the interpreter that runs the script, so `runtime/assets/SHA256SUMS` belongs to
the Python version named in `WORK/corpus.json`; another version gives an equally usable, different model.
"""

import hashlib
import json
import math
import os
import platform
import sysconfig
import time
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "runtime" / "assets"
MODEL_NAME = "pystdlib-5m"
END = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 512
SEED = 20261122

# Tables and topic dumps carry little program text, lib2to3/tests/data holds deliberately broken files, and
# _sysconfigdata holds build paths of the machine that compiled the interpreter.
EXCLUDED_FOLDERS = ("site-packages/", "encodings/", "pydoc_data/", "lib2to3/tests/", "lib-dynload/")
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
TEST_FOLDERS = ("test", "tests", "idle_test")
TEST_BYTES = 3_500_000
LARGEST_FILE = 300_000

# A line break takes the indentation that follows with it, so a Python line start is one token; words keep one leading
# space; digits are split in threes.
SPLIT = r"\s*\n[ \t]*| ?[\p{L}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"

HELDOUT_BYTES, CALIBRATION_BYTES, FINETUNE_BYTES = 200_000, 300_000, 1_100_000
FINETUNE_ROW_CHARACTERS = 2_000  # about one 512-token window


def file_hash(name: str) -> int:
    """Stable pseudo-random number of a file name; decides the split and the order."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def split_of(name: str) -> str:
    """heldout 2 %, calibration 2 %, finetune 10 %, train the rest. Only `heldout` is kept away from training."""
    bucket = file_hash(name) % 100
    return "heldout" if bucket < 2 else "calibration" if bucket < 4 else "finetune" if bucket < 14 else "train"


def read_corpus() -> dict[str, str]:
    """{relative name: text} of the standard library in file-hash order; test files are capped at TEST_BYTES."""
    root = Path(sysconfig.get_path("stdlib"))
    corpus, test_bytes = {}, 0
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    for name in sorted(names, key=lambda name: (file_hash(name), name)):
        if name.startswith(EXCLUDED_FOLDERS) or Path(name).name.startswith(EXCLUDED_PREFIXES):
            continue
        data = (root / name).read_bytes()
        try:
            text = data.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue  # a handful of test files in other encodings
        if not 200 <= len(data) <= LARGEST_FILE or "\0" in text:
            continue
        if any(part in TEST_FOLDERS for part in Path(name).parts[:-1]):
            if test_bytes + len(data) > TEST_BYTES:
                continue
            test_bytes += len(data)
        corpus[name] = text
    return corpus


def take(texts: list[str], limit: int) -> list[str]:
    """Whole files, in order, that fit together into `limit` bytes; no file takes more than half of it."""
    chosen, used = [], 0
    for text in texts:
        size = len(text.encode()) + 2
        if size <= limit // 2 and used + size <= limit:
            chosen.append(text)
            used += size
    return chosen


def rows_of(text: str) -> list[str]:
    """Pieces of at most about FINETUNE_ROW_CHARACTERS, cut between lines."""
    rows, row = [], ""
    for line in text.splitlines(keepends=True):
        if row and len(row) + len(line) > FINETUNE_ROW_CHARACTERS:
            rows.append(row)
            row = ""
        row += line
    return [*rows, row] if row.strip() else rows


def write_texts(corpus: dict[str, str], folder: Path) -> None:
    """heldout.txt, calibration.txt and finetune.jsonl."""
    by_split: dict[str, list[str]] = {}
    for name, text in corpus.items():
        by_split.setdefault(split_of(name), []).append(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heldout.txt").write_bytes("\n\n".join(take(by_split["heldout"], HELDOUT_BYTES)).encode())
    (folder / "calibration.txt").write_bytes("\n\n".join(take(by_split["calibration"], CALIBRATION_BYTES)).encode())
    rows = [row for text in take(by_split["finetune"], FINETUNE_BYTES) for row in rows_of(text)]
    lines = [json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows]
    (folder / "finetune.jsonl").write_bytes("".join(lines).encode())


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with VOCABULARY entries; decode(encode(text)) == text for any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that transformers 4 and 5 both know (5 writes `TokenizersBackend`)."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def model_config() -> LlamaConfig:
    """4.7 M parameters; every linear dimension is a multiple of 64, so every kernel path applies."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def batch_at(tokens: torch.Tensor, step: int, batch: int, context: int) -> torch.Tensor:
    """[batch, context + 1] tokens of a step: every epoch permutes the windows and shifts their start."""
    per_epoch = (len(tokens) - context - 1) // context // batch
    epoch, index = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(SEED + epoch)
    shift = int(torch.randint(context, (1,), generator=generator))
    order = torch.randperm(per_epoch * batch, generator=generator)[index * batch : (index + 1) * batch]
    starts = order * context + shift
    starts = starts.clamp(max=len(tokens) - context - 1)
    return torch.stack([tokens[start : start + context + 1] for start in starts.tolist()])


def learning_rate(step: int, steps: int, peak: float, warmup: int, stop: int, cooldown: int) -> float:
    """Linear warm-up, cosine to zero at `steps`; the last `cooldown` steps before `stop` also fall linearly to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak * cosine * min(1.0, (stop - step) / max(1, cooldown))


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def window_loss(model: torch.nn.Module, tokens: torch.Tensor, context: int = CONTEXT) -> float:
    """Mean negative log-likelihood in nats over non-overlapping windows, without the first token of each."""
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    total = 0.0
    with torch.inference_mode():
        for part in windows.split(8):
            logits = model(input_ids=part).logits[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / (len(windows) * (context - 1))


def unigram_loss(train: np.ndarray, heldout: np.ndarray) -> float:
    """Mean negative log-likelihood of a unigram model with add-one counts."""
    counts = np.bincount(train, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[heldout].mean())


def magnitude_prune_(model: torch.nn.Module, pattern: str) -> None:
    """Zero half of every block linear: the 2 smallest of each 4 (`2:4`) or of the matrix (`unstructured`)."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight = module.weight.data
        if pattern == "2:4":
            groups = weight.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0)
        else:
            flat = weight.view(-1)
            flat[flat.abs().argsort()[: flat.numel() // 2]] = 0


@click.group()
def main() -> None:
    """Build the model and the text files of sparse_rt.assets."""


WORK = click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for intermediate files.")
OUT = click.option("--out", type=click.Path(path_type=Path), default=ASSETS, show_default=True, help="Assets folder.")


@main.command()
@WORK
@OUT
def prepare(work: Path, out: Path) -> None:
    """Read the standard library, write the text files, train the tokenizer, tokenize the training files."""
    work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus()
    write_texts(corpus, out)
    train = {name: text for name, text in corpus.items() if split_of(name) != "heldout"}
    tokenizer = train_tokenizer(list(train.values()))
    save_tokenizer(tokenizer, out / MODEL_NAME)
    encoded = tokenizer.backend_tokenizer.encode_batch(list(train.values()))
    stream = np.concatenate([np.array([*item.ids, 0], dtype=np.uint16) for item in encoded])
    np.save(work / "train.npy", stream)
    digest = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in corpus.items()).encode()).hexdigest()
    facts = {
        "python": platform.python_version(),
        "files": len(corpus),
        "train_files": len(train),
        "train_bytes": sum(len(text.encode()) for text in train.values()),
        "train_tokens": len(stream),
        "corpus_sha256": digest,
    }
    (work / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
    click.echo(json.dumps(facts, indent=2))


@main.command()
@WORK
@click.option("--steps", default=4400, show_default=True, help="Where the cosine schedule reaches zero.")
@click.option("--stop", default=3200, show_default=True, help="Number of steps taken, at most --steps.")
@click.option("--cooldown", default=1000, show_default=True, help="Steps of extra linear decay before --stop.")
@click.option("--batch", default=4, show_default=True, help="Windows of 512 tokens per step.")
@click.option("--peak", default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--warmup", default=200, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--save-seconds", default=300.0, show_default=True)
@click.option("--autocast/--no-autocast", default=True, show_default=True, help="bf16 matrix products, fp32 weights.")
@click.option("--compile/--no-compile", "compiled", default=False, show_default=True, help="torch.compile the model.")
@click.option("--resume", is_flag=True, help="Continue from WORK/checkpoint.pt.")
def train(work, steps, stop, cooldown, batch, peak, warmup, threads, save_seconds, autocast, compiled, resume) -> None:
    """Train; the result depends on the seed and the options, not on the time."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    tokens = torch.from_numpy(np.load(work / "train.npy").astype(np.int64))
    model = LlamaForCausalLM(model_config())
    optimizer = make_optimizer(model)
    first = 0
    if resume:
        state = torch.load(work / "checkpoint.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    forward = torch.compile(model) if compiled else model
    click.echo(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens, steps {first}..{stop}")
    started = saved = time.monotonic()
    average = None
    for step in range(first, stop):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup, stop, cooldown)
        window = batch_at(tokens, step, batch, CONTEXT)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = forward(input_ids=window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        done = step + 1
        if done % 20 == 0:
            rate = (done - first) * batch * CONTEXT / (time.monotonic() - started)
            click.echo(f"step {done}/{stop} loss {average:.4f} {rate:.0f} tokens/s {time.strftime('%H:%M:%S')}")
        if time.monotonic() - saved > save_seconds or done == stop:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            torch.save(state, work / "checkpoint.tmp")
            os.replace(work / "checkpoint.tmp", work / "checkpoint.pt")


@main.command()
@WORK
@OUT
def export(work: Path, out: Path) -> None:
    """Write config.json, generation_config.json and the bf16 model.safetensors."""
    model = LlamaForCausalLM(model_config())
    model.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=True)["model"])
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(out / MODEL_NAME)
    (out / MODEL_NAME / "model.safetensors").chmod(0o644)


@main.command()
@WORK
@OUT
@click.option("--threads", default=2, show_default=True)
def evaluate(work: Path, out: Path, threads: int) -> None:
    """Held-out perplexity of the unigram model, the dense model and two magnitude-pruned copies, as JSON."""
    torch.set_num_threads(threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / MODEL_NAME)
    text = (out / "heldout.txt").read_text(encoding="utf-8")
    heldout = np.array(tokenizer(text)["input_ids"])
    figures = {
        "heldout_tokens": len(heldout),
        "bytes_per_token": len(text.encode()) / len(heldout),
        "unigram": math.exp(unigram_loss(np.load(work / "train.npy"), heldout)),
    }
    for pattern in ("dense", "2:4", "unstructured"):
        model = AutoModelForCausalLM.from_pretrained(out / MODEL_NAME, dtype=torch.float32).eval()
        if pattern != "dense":
            magnitude_prune_(model, pattern)
        figures[pattern] = math.exp(window_loss(model, torch.from_numpy(heldout)))
    click.echo(json.dumps(figures, indent=2))


@main.command()
@OUT
def digests(out: Path) -> None:
    """Write SHA256SUMS over every data file of the assets folder (the format of `sha256sum --check`)."""
    files = [out / "heldout.txt", out / "calibration.txt", out / "finetune.jsonl"]
    files += [path for path in (out / MODEL_NAME).iterdir() if path.suffix in (".json", ".safetensors")]
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(out).as_posix()}\n" for p in sorted(files)]
    (out / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    main()
