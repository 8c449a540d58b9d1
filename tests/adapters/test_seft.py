"""SEFT through PEFT, Trainer and files: what is saved is what was trained, and the base comes back bit for bit."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

import helpers
from sparse_rt import SEFTConfig
from sparse_rt.adapters.seft import SEFTLayer, SEFTModel
from sparse_rt.adapters.seft.optimizer import SparseAdamW
from sparse_rt.adapters.seft.window import Window
from sparse_rt.checkpoint import Checkpoint
from sparse_rt.config import FinetuneOptions, MergeOptions
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.hf.load import load
from sparse_rt.kernels import positions
from sparse_rt.nn import SparseLinear, sparse_linears
from sparse_rt.training.digest import base_digest
from sparse_rt.training.run import Collator
from sparse_rt.training.trainer import SparseTrainer
from sparse_rt.workflows.merge import merge

TOKENS = torch.arange(24).reshape(2, 12)
MODES = [("unstructured", "unstructured"), ("2:4", "survivors"), ("2:4", "nm_swap")]


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def rows(count=16, length=12):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4000, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * length} for row in tokens]


def train(model, folder, steps=11, batch=2, **options):
    fields = dict(max_steps=steps, per_device_train_batch_size=batch, learning_rate=0.01, save_strategy="no")
    fields |= dict(report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, seed=1)
    arguments = TrainingArguments(output_dir=str(folder), **{**fields, **options})
    torch.manual_seed(0)
    trainer = SparseTrainer(model, arguments, Collator(0), rows())
    trainer.train()
    return trainer


def adapted(folder, mode, **options):
    torch.manual_seed(0)
    fields = dict(task_type="CAUSAL_LM", density=0.05, mode=mode, interval=4, window=2, drop_rate=0.5)
    return get_peft_model(load(folder), SEFTConfig(**{**fields, **options}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    room = tmp_path_factory.mktemp("seft")
    dense = helpers.tiny_llama(room / "dense")
    return {p: helpers.compress_folder(dense, room / p.replace(":", "of"), p) for p in ("unstructured", "2:4")}


@pytest.mark.parametrize("pattern, mode", MODES)
def test_a_trained_adapter_loads_merges_and_lets_go(folders, tmp_path, pattern, mode):
    base, plain = folders[pattern], logits(load(folders[pattern]))
    tensors = {name: (w.values.clone(), w.metadata.clone()) for name, w in sparse_linears(load(base))}
    model = adapted(base, mode)
    trainer = train(model, tmp_path / "run")
    moved = trainer.parts.callbacks[0].moved
    expected = logits(model)
    layers = dict(sparse_linears(model))
    assert moved > 100 and not torch.equal(expected, plain)
    for name, layer in layers.items():  # the count of every matrix is exact
        assert (
            layer.values.numel() == tensors[name.split("base_model.model.")[1].removesuffix(".base_layer")][0].numel()
        )
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), expected)

    model.peft_config["default"].base_digest = base_digest(Checkpoint.open(base))
    model.save_pretrained(tmp_path / "adapter")
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(load(base), tmp_path / "adapter", low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype="auto")), expected)
    result = merge(MergeOptions.build(model=str(base), adapter=str(tmp_path / "adapter"), output_dir=tmp_path / "out"))
    assert torch.equal(logits(load(tmp_path / "out")), expected) and result["logits_error"] == 0
    assert result["mask"] == ("identical" if mode == "survivors" else "count identical")
    assert (result["moved_positions"] > 0) == (mode != "survivors")

    restored = loaded.unload()
    assert torch.equal(logits(restored), plain)
    for name, layer in sparse_linears(restored):
        assert torch.equal(layer.values, tensors[name][0]) and torch.equal(layer.metadata, tensors[name][1])
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    for name, layer in sparse_linears(merged):
        layer.format.check_data(name, layer.values, layer.metadata, layer.out_features, layer.in_features)
        assert torch.equal(layer.metadata, tensors[name][1]) == (mode == "survivors")
    merged.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), expected)


def test_an_adapter_from_the_middle_of_a_training_is_not_merged(folders, tmp_path):
    base = folders["unstructured"]
    model = adapted(base, "unstructured", interval=3)
    parts = model.base_model.training_parts(TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    (evolve,) = parts.callbacks
    state = SimpleNamespace(global_step=1, max_steps=100)
    evolve.on_step_begin(None, state, None)
    model(TOKENS, labels=TOKENS).loss.backward()
    evolve.on_pre_optimizer_step(None, state, None)
    evolve.evolve(0.5)
    model.peft_config["default"].base_digest = base_digest(Checkpoint.open(base))
    model.save_pretrained(tmp_path / "adapter")
    options = MergeOptions.build(model=str(base), adapter=str(tmp_path / "adapter"), output_dir=tmp_path / "out")
    with pytest.raises(CheckFailed, match="saved before its training ended"):
        merge(options)
    evolve.on_train_end(None, state, None)  # a run that was stopped: back to the count by magnitude
    assert all(layer.evolution.excess == 0 for layer in evolve.layers.values())


def test_a_forward_pass_that_gradient_checkpointing_repeats_counts_once(folders, tmp_path):

    def trained(**options):
        model = adapted(folders["unstructured"], "unstructured")
        train(model, tmp_path / "run", **options)
        return {name: p.detach() for name, p in model.named_parameters() if ".seft_" in name}

    accumulated = {"gradient_accumulation_steps": 2}
    plain, repeated = trained(**accumulated), trained(gradient_checkpointing=True, **accumulated)
    assert all(torch.equal(plain[name], repeated[name]) for name in plain)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest floating-point tensor that any operation makes, views of ``given`` aside."""

    def __init__(self, given):
        super().__init__()
        self.elements, self.given = 0, given.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                continue
            if tensor.untyped_storage().data_ptr() != self.given:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_more_than_a_block_of_rows_of_the_gradient_exists(monkeypatch):
    m, n = 96, 64
    monkeypatch.setitem(positions.TILE_ELEMENTS, "cpu", 4 * n)
    values, metadata, _ = helpers.compressed(m, n, "unstructured", sparsity=0.9)
    layer = SEFTLayer(SparseLinear(n, m, "unstructured", values, metadata, None), "default", SEFTConfig(density=0.01))
    weight, (update,) = layer.compressed(), layer.updates(["default"])
    layer.window = window = Window("unstructured")
    x, dy = torch.randn(3, n), torch.randn(3, m)
    with LargestTensor(weight.values) as seen:
        found, _ = update.fused.gradients(weight, dy, x, *update.parameters)
    assert found.numel() == 61 and window.positions.numel() <= 2 * 61
    assert seen.elements == max(4 * n, 3 * m), "a block of 4 rows; the largest input has 3 rows"


def test_the_optimizer_is_adamw_where_all_are_equally_old():
    torch.manual_seed(0)
    one, other = (torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    ours, theirs = SparseAdamW([one], lr=0.1, weight_decay=0.1), torch.optim.AdamW([other], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        one.grad = torch.randn(50)
        other.grad = one.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(one, other)


def test_the_budget_is_that_of_lora(folders):
    model = adapted(folders["2:4"], None, density=None, rank=4)
    layers = [layer for _, layer in model.base_model._layers()]
    lora = 4 * sum(layer.in_features + layer.out_features for layer in layers)
    found = sum(layer.seft_delta["default"].numel() for layer in layers)
    assert lora - len(layers) <= found <= lora
    shares = {round(x.seft_delta["default"].numel() / (x.in_features * x.out_features), 2) for x in layers}
    assert len(shares) == 1, "in proportion to the size"


@pytest.mark.parametrize(
    "pattern, options, words",
    [
        ("2:4", {"mode": "unstructured"}, "would break its pattern 2:4; use survivors or nm_swap"),
        ("unstructured", {"mode": "nm_swap"}, "swaps within the groups of N:M"),
        ("2:4", {"mode": "any"}, "mode must be one of unstructured, survivors, nm_swap, got 'any'"),
        ("2:4", {"window": 5}, r"window must be from 1 to interval \(4\)"),
        ("2:4", {"density": 2.0}, "density must be above 0"),
    ],
)
def test_options_that_do_not_fit(folders, pattern, options, words):
    with pytest.raises(UserError, match=words):
        adapted(folders[pattern], **{"mode": None, **options})


@pytest.mark.parametrize(
    "options, words",
    [
        ({"optim": "sgd"}, "brings its own AdamW"),
        ({"fp16": True}, "use bf16 or float32"),
        ({"fsdp": True}, "FSDP and DeepSpeed cut into shards"),
    ],
)
def test_ways_of_training_that_do_not_fit(folders, options, words):
    fields = dict(fp16=False, bf16=False, optim="adamw_torch", fsdp="", deepspeed=None, n_gpu=0)
    model = adapted(folders["2:4"], None)
    with pytest.raises(UserError, match=words):
        SEFTModel.training_parts(model.base_model, SimpleNamespace(**{**fields, **options}))


def test_a_second_adapter_on_a_moving_mask_is_refused(folders):
    model = adapted(folders["unstructured"], "unstructured")
    with pytest.raises(UserError, match="the only one of its layers, and there is 'second'; use mode survivors"):
        model.add_adapter("second", SEFTConfig(mode="survivors"))


@pytest.mark.slow
def test_two_processes_decide_alike(folders, tmp_path):
    """DDP over gloo: deltas, positions, values and metadata of both are the same bits in the end."""
    options = FinetuneOptions.build(
        model=str(folders["unstructured"]),
        output_dir=tmp_path / "out",
        adapter="seft",
        adapter_options={"density": 0.05, "interval": 4, "window": 2, "drop_rate": 0.5},
        max_seq_len=32,
        trainer={"max_steps": 11, "per_device_train_batch_size": 1, "save_strategy": "no", "use_cpu": True},
    ).model_dump(mode="json")
    script = tmp_path / "train.py"
    script.write_text(
        "import hashlib, os, torch\n"
        "from sparse_rt.config import FinetuneOptions\nfrom sparse_rt.workflows import finetune\n"
        "from sparse_rt.adapters.seft.evolve import Evolve\n"
        "from pathlib import Path\n"
        "end = Evolve.on_train_end\n"
        "def tell(self, args, state, control, **kwargs):\n"
        "    end(self, args, state, control, **kwargs)\n"
        "    total = hashlib.sha256()\n"
        "    for layer in self.layers.values():\n"
        "        for tensor in (*layer.parameters_of('default'), layer.base_layer.values, layer.base_layer.metadata):\n"
        "            total.update(tensor.detach().view(torch.uint8).numpy().tobytes())\n"
        "    text = f'{total.hexdigest()} {self.moved > 0}'\n"
        f"    Path({str(tmp_path)!r}, 'rank' + os.environ['RANK']).write_text(text)\n"
        "Evolve.on_train_end = tell\n"
        f"finetune.finetune(FinetuneOptions(**{options!r}))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and told[0].endswith("True")
