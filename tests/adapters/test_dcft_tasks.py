"""DCFT over a sequence of tasks: penalties, the earlier adapter, and a resume to the bit."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainingArguments

import helpers
from sparse_rt import DCFTConfig, SPPConfig
from sparse_rt.adapters.dcft import penalties
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import FinetuneOptions, MergeOptions, read_yaml
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.hf.load import load
from sparse_rt.progress import Progress
from sparse_rt.training.digest import base_digest
from sparse_rt.workflows.finetune import finetune
from sparse_rt.workflows.merge import merge

TRAINER = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 0.05, "warmup_steps": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dcft")
    return helpers.compress_folder(helpers.tiny_model(folder / "dense", "qwen2"), folder / "base", "2:4")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) for i in range(24)))
    return path


@pytest.fixture
def options(base, rows, tmp_path):
    def make(output="out", trainer=(), **changes):
        fields = dict(model=str(base), output_dir=tmp_path / output, dataset=str(rows), max_seq_len=32, adapter="dcft")
        return FinetuneOptions.build(**{**fields, "trainer": {**TRAINER, **dict(trainer)}, **changes})

    return make


@pytest.fixture(scope="module")
def first(base, rows, tmp_path_factory):
    """An adapter of a first task with the penalty taylor, without it, and SPP's."""
    folder = tmp_path_factory.mktemp("first")
    for name, fields in {
        "taylor": dict(adapter="dcft", adapter_options={"penalty": "taylor"}),
        "frob": dict(adapter="dcft"),
        "spp": dict(adapter="spp"),
    }.items():
        common = dict(model=str(base), output_dir=folder / name, dataset=str(rows), max_seq_len=32)
        finetune(FinetuneOptions.build(**common, trainer=TRAINER, **fields))
    return folder


class Interrupt(Progress):
    def __init__(self, step):
        self.step = step

    def track(self, items, description, total=None):
        for done, item in enumerate(items):
            if done == self.step:
                raise KeyboardInterrupt
            yield item


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def formula(kind, m, p, w):
    if kind == "frob":
        return (m - p).square().sum() / p.square().sum()
    if kind == "cos":
        return 1 - (m @ p) / (m.norm() * p.norm())
    return (w * (m - p).square()).sum()


@pytest.mark.parametrize("kind", ["frob", "cos", "taylor"])
def test_penalties_and_their_gradients_in_float64(base, tmp_path, kind):
    model = get_peft_model(load(base), DCFTConfig(penalty=kind, similarity=3.0))
    layers = model.base_model._layers("default")
    with torch.no_grad():
        for layer in layers:
            layer.dcft_a["default"].normal_(std=0.2)
    model.base_model.continue_from_here("default")
    with torch.no_grad():
        for layer in layers:
            layer.dcft_a["default"] += 0.1 * torch.randn_like(layer.dcft_a["default"])
            if kind == "taylor":
                layer.dcft_importance["default"].uniform_(0, 1)
    (penalty,) = model.base_model.training_parts(TrainingArguments(output_dir=str(tmp_path))).penalties
    found = penalty()
    found.backward()
    strength, expected = 3.0 if kind == "taylor" else 3.0 / len(layers), 0.0
    for layer in layers:
        a = layer.dcft_a["default"].detach().double()
        m, p = (1 + a).requires_grad_(), 1 + layer.reference["default"].double()
        w = layer.dcft_importance["default"].double() if kind == "taylor" else None
        value = strength * formula(kind, m, p, w)
        value.backward()
        torch.testing.assert_close(layer.dcft_a["default"].grad.double(), m.grad, rtol=1e-4, atol=1e-7)
        expected += float(value)
        if kind == "frob":
            gradient = 2 * strength * (m - p) / p.square().sum()
        elif kind == "cos":
            gradient = -strength * (p / (m.norm() * p.norm()) - (m @ p) * m / (m.norm() ** 3 * p.norm()))
        else:
            gradient = 2 * strength * w * (m - p)
        torch.testing.assert_close(m.grad, gradient.detach(), rtol=1e-9, atol=1e-12)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_cosine_of_nearly_equal_maps_is_exact():
    a = torch.full((4096,), 1e-4) * torch.randn(4096)
    exact = 1 - torch.nn.functional.cosine_similarity(1 + a.double(), torch.ones(4096, dtype=torch.float64), dim=0)
    assert float(penalties.cos(a, torch.zeros(4096))) == pytest.approx(float(exact), rel=1e-3)


def test_the_importance_is_the_mean_of_what_entries_gained(options, base, first, tmp_path, monkeypatch):
    """w against gradients of the loss alone that are recorded from outside."""
    seen = []
    real = penalties.Importance.on_pre_optimizer_step

    def record(self, *args, **kwargs):
        layer = self.layers[0]
        moved = layer.dcft_a["default"].detach() - layer.reference["default"]
        seen.append((layer.gradient.clone(), moved, layer.dcft_a["default"].grad.clone()))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(penalties.Importance, "on_pre_optimizer_step", record)
    # Two micro-batches a step; without clipping the loss's gradient is the whole one as long as w is zero.
    trainer = {"gradient_accumulation_steps": 2, "max_grad_norm": 0, "max_steps": 3}
    fields = dict(adapter_options={"penalty": "taylor", "similarity": 1e6}, previous=str(first / "frob"))
    finetune(options(trainer=trainer, **fields))
    assert len(seen) == 3 and not seen[0][1].any() and seen[1][1].any()
    torch.testing.assert_close(seen[0][0], seen[0][2])
    assert not torch.allclose(seen[2][0], seen[2][2]), "the penalty's own gradient is not a gain"
    expected = torch.stack([(gradient * moved).abs() for gradient, moved, _ in seen]).mean(0)
    saved = tensors(tmp_path / "out")
    name = next(n for n in get_peft_model(load(base), DCFTConfig()).targeted_module_names)
    torch.testing.assert_close(saved[f"base_model.model.{name}.dcft_importance"], expected)
    assert saved[f"base_model.model.{name}.dcft_steps"].item() == 3


@pytest.mark.parametrize("kind", ["taylor", "frob"])
def test_a_second_task_resumes_to_the_bit(options, first, tmp_path, kind):
    fields = dict(adapter_options={"penalty": kind, "similarity": 1e5 if kind == "taylor" else 1.0})
    fields |= dict(previous=str(first / kind), seed=1)
    finetune(options("whole", **fields))
    with pytest.raises(KeyboardInterrupt):
        finetune(options("out", **fields), Interrupt(5))
    with pytest.raises(UserError, match="other values of previous"):
        finetune(options("out", **fields | {"previous": None}, resume=True))
    resumed = finetune(options("out", resume=True, **fields))
    assert resumed["resumed_from"] == "checkpoint-4"
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")
    if kind == "taylor":
        steps = [t for name, t in tensors(tmp_path / "out").items() if name.endswith("dcft_steps")]
        assert steps and all(t.item() == 12 for t in steps), "the mean goes on from the first task"


@pytest.mark.slow
def test_kill_9_in_a_second_task_resumes_to_the_bit(options, first, tmp_path):
    fields = dict(adapter_options={"penalty": "taylor", "similarity": 1e5}, previous=str(first / "taylor"))
    helpers.run_until_killed("finetune", options("out", **fields), after=3, cwd=tmp_path)
    assert finetune(options("out", resume=True, **fields))["resumed_from"] == "checkpoint-2"
    finetune(options("whole", **fields))
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


def test_a_strong_penalty_keeps_the_map_of_the_task_before(options, first, tmp_path):
    before = tensors(first / "frob")

    def moved(similarity):
        previous = str(first / "frob")
        finetune(options(f"{similarity}", previous=previous, adapter_options={"similarity": similarity}))
        after = tensors(tmp_path / f"{similarity}")
        return sum(float((after[name] - before[name]).norm()) for name in before)

    assert 0 < moved(1e4) < 0.3 * moved(0.0)


def test_the_folder_says_what_it_went_on_from(options, first, base, tmp_path):
    result = finetune(options(previous=str(first / "spp"), adapter="spp", trainer={"max_steps": 1}))
    assert result["previous"] == str(first / "spp")
    told = read_yaml(tmp_path / "out" / "run.yaml")
    assert told["previous"] == str(first / "spp")
    assert (
        f"| goes on from | `spp` (sha256 `{result['previous_digest']}`) |" in (tmp_path / "out/README.md").read_text()
    )
    finetune(FinetuneOptions.build(**{**told, "output_dir": tmp_path / "again"}))
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "out")
    before, after = tensors(first / "spp"), tensors(tmp_path / "out")
    differ = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < differ < 0.2, "one step away from where it started"


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("spp", {}, "is an adapter of the kind spp and this run trains dcft"),
        ("frob", {"adapter_options": {"share": 2}}, "made with other options: share was 1 and is 2"),
        ("spp", {"adapter": "spp", "adapter_options": {"groups": 8}}, "groups was 16 and is 8"),
        ("missing", {}, "missing"),
    ],
)
def test_another_earlier_adapter_is_refused(options, first, tmp_path, kind, changes, words):
    with pytest.raises(UserError, match=words):
        finetune(options(previous=str(first / kind), **changes))
    assert not (tmp_path / "out").exists()


def test_an_earlier_adapter_is_not_overwritten(options, first):
    with pytest.raises(UserError, match="holds the earlier adapter"):
        finetune(options(output_dir=first / "frob", previous=str(first / "frob"), overwrite=True))


def test_an_earlier_adapter_of_another_base_is_refused(options, first, tmp_path):
    other = helpers.compress_folder(helpers.tiny_model(tmp_path / "dense", "qwen2", seed=3), tmp_path / "other", "2:4")
    with pytest.raises(UserError, match="was trained on other weights .* give the model it was trained on"):
        finetune(options(model=str(other), previous=str(first / "frob")))
    get_peft_model(load(other), SPPConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "unknown")
    with pytest.raises(UserError, match="does not say which weights it was trained on"):
        finetune(options(model=str(other), adapter="spp", previous=str(tmp_path / "unknown")))


def test_taylor_and_fp16_are_refused(base, tmp_path):
    model = get_peft_model(load(base), DCFTConfig(penalty="taylor"))
    arguments = TrainingArguments(output_dir=str(tmp_path))
    arguments.fp16 = True
    with pytest.raises(UserError, match="use bf16"):
        model.base_model.training_parts(arguments)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "opt"])
def test_merge_changes_biases_and_norms_too(tmp_path, family):
    base = helpers.compress_folder(helpers.tiny_model(tmp_path / "dense", family), tmp_path / "base", "unstructured")
    model = get_peft_model(load(base), DCFTConfig(units="qk,vo,ud", penalty="taylor", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dcft_a" in name:
                parameter.normal_(std=0.3)
    model.peft_config["default"].base_digest = base_digest(Checkpoint.open(base))
    model.save_pretrained(tmp_path / "adapter")
    fields = dict(model=str(base), adapter=str(tmp_path / "adapter"))
    result = merge(MergeOptions.build(**fields, output_dir=tmp_path / "out", dtype="float32"))
    assert result["logits_error"] < 1e-5 < result["adapter_effect"] and result["notes"] == []
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    changed = {n for n in before.dense_tensors() if not torch.equal(before.load(n).float(), after.load(n))}
    assert {name.rpartition(".layers.")[2] for name in changed} == {
        "llama": set(),
        "qwen2": {f"{i}.self_attn.{p}_proj.bias" for i in (0, 1) for p in "qv"},
        "qwen3": {f"{i}.self_attn.q_norm.weight" for i in (0, 1)},
        "opt": {f"{i}.self_attn.{p}_proj.bias" for i in (0, 1) for p in "qv"},
    }[family]
    narrow = merge(MergeOptions.build(**fields, output_dir=tmp_path / "narrow"))
    assert narrow["logits_error"] < 0.02 and narrow["mask"] == "identical"
    assert narrow["merged_weights"] == 4 if family == "qwen3" else 6


def test_a_norm_that_overflows_in_the_chosen_dtype_fails_the_check(tmp_path):
    base = helpers.compress_folder(helpers.tiny_model(tmp_path / "dense", "qwen3"), tmp_path / "base", "2:4")
    model = get_peft_model(load(base), DCFTConfig(units="qk", task_type="CAUSAL_LM"))
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_norm.dcft_a["default"][3] = 1e5
    model.save_pretrained(tmp_path / "adapter")
    fields = dict(model=str(base), adapter=str(tmp_path / "adapter"), output_dir=tmp_path / "out", verify=False)
    with pytest.raises(
        CheckFailed, match=r"gives NaN or Inf in model\.layers\.0\.self_attn\.q_norm\.weight as float16"
    ):
        merge(MergeOptions.build(**fields, dtype="float16"))
