"""How a run is cut up does not change what is learnt: packing, accumulation, checkpointing, bfloat16, evaluation."""

import json
import math

import pytest
import torch
from peft import PeftModel

import helpers
from sparse_rt.adapters.registry import adapter_names
from sparse_rt.config import read_yaml
from sparse_rt.data import training_dataset
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.training.dataset import refuse_leaking
from sparse_rt.training.run import Collator
from sparse_rt.workflows.finetune import finetune

WEIGHTS = "adapter_model.safetensors"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def losses(result, name="losses"):
    return torch.tensor([loss for _, loss in result[name]])


def token_losses(model, batch):
    """The loss of every predicted token of a batch, by label, sorted."""
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    each = torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=-100, reduction="none")
    return each[labels != -100].sort().values


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_texts_have_the_losses_they_have_alone(base, rows, attention):
    model = load(base, attn_implementation=attention)
    refuse_leaking(model)
    tokenizer, collate = load_tokenizer(base), Collator(0)
    packed, plain = (training_dataset(rows, tokenizer, 64, packing=packing) for packing in (True, False))
    assert len(packed) <= len(plain) / 2
    with torch.no_grad():
        batch = collate(list(packed))
        assert "attention_mask" not in batch and batch["input_ids"].shape[0] == len(packed) > 1
        found, expected = token_losses(model, batch), token_losses(model, collate(list(plain)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_packing_does_not_leak_in_other_families(family, tmp_path):
    refuse_leaking(load(helpers.tiny_model(tmp_path / family, family)))


def test_a_model_that_ignores_positions_is_refused_for_packing(tmp_path):
    model = load(helpers.tiny_model(tmp_path / "llama", "llama"))
    forward = model.forward
    model.forward = lambda *args, position_ids=None, **options: forward(*args, **options)
    with pytest.raises(UserError, match="packing does not work with llama models"):
        refuse_leaking(model)


def test_a_packed_run_counts_its_tokens_and_learns_the_same(options):
    """One step over all rows: the same loss, the same tokens."""
    trainer = {"max_steps": 1, "per_device_train_batch_size": 64}
    plain = finetune(options("plain", trainer, eval_fraction=0.3))
    packed = finetune(options("packed", trainer, packing=True, eval_fraction=0.3))
    assert packed["rows"] < plain["rows"] and packed["tokens"] == plain["tokens"]
    torch.testing.assert_close(losses(packed), losses(plain), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses(packed, "eval_losses"), losses(plain, "eval_losses"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("adapter", adapter_names())
def test_accumulated_batches_equal_one_large_batch(options, adapter):
    whole = finetune(options("whole", {"per_device_train_batch_size": 8}, adapter))
    trainer = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    pieces = finetune(options("pieces", trainer, adapter))
    torch.testing.assert_close(losses(pieces), losses(whole), rtol=1e-5, atol=1e-5)
    norms = [[log["grad_norm"] for log in logs(result) if "grad_norm" in log] for result in (whole, pieces)]
    torch.testing.assert_close(torch.tensor(norms[1]), torch.tensor(norms[0]), rtol=1e-3, atol=1e-6)


def logs(result):
    return json.loads(open(f"{result['output_dir']}/trainer_state.json").read())["log_history"]


@pytest.mark.parametrize("adapter", adapter_names())
def test_activation_checkpoints_change_no_bit(options, tmp_path, adapter):
    options_ = {"adapter_options": {"dropout": 0.1}} if adapter in ("spp", "masklora") else {}
    finetune(options("plain", adapter=adapter, **options_))
    for reentrant in (False, True):
        trainer = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        finetune(options(f"saved-{reentrant}", trainer, adapter, **options_))
        saved = (tmp_path / f"saved-{reentrant}" / WEIGHTS).read_bytes()
        assert saved == (tmp_path / "plain" / WEIGHTS).read_bytes(), f"use_reentrant={reentrant}"


@pytest.mark.parametrize("adapter", adapter_names())
def test_bfloat16_computes_and_the_adapter_stays_float32(options, base, tmp_path, adapter):
    plain = finetune(options("plain", adapter=adapter))
    half = finetune(options("half", {"bf16": True}, adapter))
    torch.testing.assert_close(losses(half), losses(plain), rtol=2e-2, atol=0)
    assert losses(half).tolist() != losses(plain).tolist()
    model = PeftModel.from_pretrained(load(base), tmp_path / "half", is_trainable=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.fixture
def chats(base, tmp_path):
    """(model folder with a chat template, conversations of two answers)."""
    folder = tmp_path / "chat-model"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).symlink_to(path)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT}))
    rows = tmp_path / "chats.jsonl"
    turns = lambda i: [("user", f"{i}?"), ("assistant", f"x = {i}"), ("user", "again"), ("assistant", f"y = {i}")]  # noqa: E731
    rows.write_text(
        "\n".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns(i)]}) for i in range(24))
    )
    return folder, rows


@pytest.mark.parametrize("packing", [False, True])
def test_a_model_learns_the_answers_of_chats(options, chats, packing):
    model, rows = chats
    fields = dict(model=str(model), dataset=str(rows), max_seq_len=64, packing=packing, eval_fraction=0.25)
    trainer = {"max_steps": 12, "learning_rate": 0.1}
    answers = finetune(options("answers", trainer, completion_only=True, **fields))
    assert answers["eval_loss"] < answers["eval_loss_before"] - 0.3
    everything = finetune(options("all", trainer, **fields))
    assert everything["losses"] != answers["losses"] and everything["rows"] == answers["rows"]


def test_evaluation_is_in_every_output_and_changes_nothing_in_training(options, rows, tmp_path):
    result = finetune(options(eval_dataset=str(rows)))
    assert [step for step, _ in result["eval_losses"]] == [0, 1, 2, 3, 4]
    assert result["eval_loss"] == result["eval_losses"][-1][1] < result["eval_loss_before"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for name in (
        "eval_loss",
        "eval_loss_before",
        "losses",
        "tokens_per_second",
        "peak_memory_bytes",
        "steps",
        "tokens",
    ):
        assert metrics[name] == json.loads(json.dumps(result[name]))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{result['eval_loss_before']:.4f} before, {result['eval_loss']:.4f} after" in card
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000
    finetune(options("plain"))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()
    told = read_yaml(tmp_path / "out" / "run.yaml")
    assert told["eval_dataset"] == str(rows) and told["trainer"]["eval_strategy"] == "steps"


def test_the_evaluation_loss_is_a_mean_over_tokens(options, base, rows):
    found = [
        finetune(options(f"b{b}", {"max_steps": 1, "per_device_eval_batch_size": b}, eval_dataset=str(rows)))
        for b in (1, 7)
    ]
    torch.testing.assert_close(*(losses(result, "eval_losses") for result in found), rtol=1e-5, atol=0)
    model, tokenizer = load(base), load_tokenizer(base)
    with torch.no_grad():
        each = token_losses(model, Collator(0)(list(training_dataset(rows, tokenizer, 32))))
    assert math.isclose(found[0]["eval_loss_before"], each.double().mean(), rel_tol=1e-5)


def test_two_sources_to_evaluate_on_are_refused(options, rows):
    with pytest.raises(UserError, match="either eval_dataset or eval_fraction"):
        finetune(options(eval_dataset=str(rows), eval_fraction=0.1))


def test_reports_go_where_report_to_says(options, tmp_path):
    pytest.importorskip("tensorboard")
    finetune(options(trainer={"report_to": "tensorboard", "logging_dir": str(tmp_path / "logs")}))
    assert list((tmp_path / "logs").rglob("events.out.*"))


def test_a_reporter_that_is_not_installed_is_named(options):
    with pytest.raises(UserError, match="report_to: .*swanlab to be installed"):
        finetune(options(trainer={"report_to": "swanlab"}))
