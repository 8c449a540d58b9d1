"""``finetune --teacher``: live or from disk, resumed or not; what cannot teach is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import helpers
from sparse_rt.config import FinetuneOptions
from sparse_rt.data import training_dataset
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.progress import Progress
from sparse_rt.training.distillation import cache, losses
from sparse_rt.training.distillation.teacher import LiveTeacher
from sparse_rt.training.run import Collator
from sparse_rt.workflows.finetune import finetune

TRAINER = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return helpers.tiny_llama(tmp_path_factory.mktemp("distil") / "dense", dtype=torch.float32)


@pytest.fixture(scope="module")
def base(dense):
    return helpers.compress_folder(dense, dense.parent / "base", "2:4")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [f"def f{i}(x):\n    return x + {i}{' + 1' * (i % 5)}\n" for i in range(24)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture
def run(base, dense, rows, tmp_path):
    def start(output="out", trainer=(), progress=None, **changes):
        fields = dict(model=str(base), output_dir=tmp_path / output, dataset=str(rows), max_seq_len=32)
        fields |= {"adapter": "values", "teacher": str(dense), "trainer": {**TRAINER, **dict(trainer)}}
        fields = {name: value for name, value in {**fields, **changes}.items() if value is not None}
        return finetune(FinetuneOptions.build(**fields), progress)

    return start


class Interrupt(Progress):
    def track(self, items, description, total=None):
        for done, item in enumerate(items):
            if done == 5 and description == "training":
                raise KeyboardInterrupt
            yield item


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("distill", ["kl", "squarehead", "both"])
def test_the_student_comes_closer_to_the_teacher(run, dense, base, rows, tmp_path, distill):
    result = run(distill=distill, ce_weight=0.0, trainer={"max_steps": 30, "save_strategy": "no"})
    assert result["last_loss"] < 0.7 * result["first_loss"]
    said = result["distillation"]
    assert (said["ce"], said["kl"], said["squarehead"]) == (0.0, float(distill != "squarehead"), float(distill != "kl"))
    assert len(said["teacher"]) == 64


@pytest.mark.parametrize("packing", [False, True])
def test_a_cache_with_every_token_teaches_like_the_live_teacher(run, tmp_path, packing):
    """All 4096 tokens and float16 log-probabilities, bfloat16 hidden states: the same losses up to that rounding."""
    live = run("live", distill="both", packing=packing)
    kept = dict(distill="both", packing=packing, teacher_cache=tmp_path / "cache", teacher_top_k=5000)
    cached = run("cached", **kept)
    for (_, one), (_, other) in zip(live["losses"], cached["losses"], strict=True):
        assert one == pytest.approx(other, rel=2e-3)
    # Another order of the rows, and no teacher any more.
    again = run("again", **kept, seed=1, teacher=None) if not packing else run("again", **kept, teacher=None)
    assert again["distillation"]["teacher"] is None and again["steps"] == 6


def test_accumulation_equals_one_large_batch(run, tmp_path):
    options = dict(distill="both", temperature=2.0)
    # Plain steps of the gradient: AdamW's first steps are the signs of it, which would hide a factor.
    sgd = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.1, "logging_steps": 1}
    one = run("one", trainer={**sgd, "per_device_train_batch_size": 8}, **options)
    two = run("two", trainer={**sgd, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, **options)
    assert one["losses"][1][1] == pytest.approx(two["losses"][1][1], rel=1e-4)
    for name, expected in weights(tmp_path / "one").items():
        found = weights(tmp_path / "two")[name]
        assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("cached", [False, True])
def test_resume_is_exact(run, tmp_path, cached):
    options = dict(distill="both", teacher_cache=tmp_path / "cache" if cached else None)
    run("whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run("out", progress=Interrupt(), **options)
    with pytest.raises(UserError, match="other values of teacher: temperature"):
        run(
            "out",
            resume=True,
            **{**options, "temperature": 3.0, "teacher_cache": None if not cached else tmp_path / "x"},
        )
    assert run("out", resume=True, **options)["resumed_from"] == "checkpoint-4"
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


def test_the_cache_holds_the_outputs_of_the_teacher(dense, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 60_000)
    monkeypatch.setattr(cache, "BATCH_TOKENS", 100)
    dataset, collate = training_dataset(rows, load_tokenizer(dense), 32), Collator(0)
    options = {"top_k": 5, "temperature": 1.5, "hidden": True}
    teacher = LiveTeacher(load(dense), True)
    stored = cache.open_cache(tmp_path / "cache", lambda: teacher, "t", dataset, options, collate, Progress())
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) > 1
    batch = collate([dataset[3], dataset[0], dataset[3]])
    found, expected, real = stored(batch), teacher(batch), batch["attention_mask"].bool()
    ids, log_p = losses.top(expected.logits, 5, 1.5)
    torch.testing.assert_close(found.top[1][real].float(), log_p[real], rtol=2e-3, atol=2e-3)
    assert (found.top[0][real] == ids[real]).float().mean() > 0.99  # of equal logits either may come first
    for one, other in zip(found.hidden, expected.hidden, strict=True):
        torch.testing.assert_close(one[real].float(), other[real], rtol=1e-2, atol=1e-2)


def test_a_stale_cache_is_refused(run, dense, rows, tmp_path):
    options = dict(teacher_cache=tmp_path / "cache", distill="kl", trainer={"max_steps": 1, "save_strategy": "no"})
    run("first", **options)
    other = helpers.tiny_llama(tmp_path / "other", dtype=torch.float32, seed=1)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(rows.read_text().splitlines()[:8]))
    for changes, words in (
        ({"teacher": str(other)}, "other values of teacher;"),
        ({"dataset": str(fewer)}, "other values of rows;"),
        ({"temperature": 2.0}, "other values of temperature"),
        ({"distill": "both"}, "other values of hidden"),
        ({"teacher_top_k": 3}, "other values of top_k"),
        ({"teacher_cache": rows.parent}, "is no teacher cache"),
        ({"teacher_cache": tmp_path / "none", "teacher": None}, "no teacher cache in .*; give --teacher"),
    ):
        with pytest.raises(UserError, match=words):
            run("out", **{**options, **changes})
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"take 0\.00 GB, and the disk .* has 0\.00 GB left; lower --teacher-top-k"):
        run(teacher_cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vocab_size": 4000}, "vocab_size 4000, the student 4096; a teacher needs the same tokenizer"),
        ({"hidden_size": 32}, "hidden_size 32, the student 64; .* or leave SquareHead out"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 1, the student 2"),
    ],
)
def test_another_kind_of_teacher_is_refused(run, tmp_path, changes, words):
    teacher = helpers.tiny_llama(tmp_path / "teacher", **changes)
    with pytest.raises(UserError, match=words):
        run(teacher=str(teacher), distill="both")
    if "vocab_size" not in changes:
        assert run(teacher=str(teacher), trainer={"max_steps": 1, "save_strategy": "no"})["distillation"]["kl"] == 1


def test_a_teacher_with_another_tokenizer_is_refused(run, dense, tmp_path):
    teacher = helpers.tiny_llama(tmp_path / "teacher")
    path = teacher / "tokenizer.json"
    told = json.loads(path.read_text())
    vocabulary = told["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="another tokenizer"):
        run(teacher=str(teacher))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"teacher": None, "distill": "kl"}, "--distill needs a teacher"),
        ({"teacher": None, "temperature": 2.0}, "--temperature needs a teacher"),
        ({"kl_weight": 0.0}, "teaches nothing"),
        ({"distill": "magic"}, "distill"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_options_that_contradict_each_other(run, changes, words):
    with pytest.raises(UserError, match=words):
        run(**changes)
