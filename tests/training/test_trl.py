"""TRL's SFTTrainer trains compressed models with our configs, and takes the penalties of ``ExtraLoss``."""

import pytest
import torch

pytest.importorskip("trl", reason="TRL is optional: pip install trl")

from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer

from sparse_rt import MaskLoRAConfig, SPPConfig
from sparse_rt.adapters.parts import TrainingParts
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.nn import sparse_linears
from sparse_rt.training.trainer import ExtraLoss


@pytest.fixture
def trainer_for(base, tmp_path):
    rows = Dataset.from_dict({"text": [f"def f{i}(x):\n    return x + {i}\n" for i in range(32)]})

    def make(model, trainer=SFTTrainer, **options):
        config = SFTConfig(
            output_dir=str(tmp_path / "run"), max_steps=8, per_device_train_batch_size=8, learning_rate=0.05,
            logging_steps=1, save_strategy="no", report_to="none", max_length=32, use_cpu=True, bf16=False,
            disable_tqdm=True,
        )  # fmt: skip
        return trainer(model, config, train_dataset=rows, processing_class=load_tokenizer(base), **options)

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("config", [SPPConfig, MaskLoRAConfig])
def test_sft_trainer_trains_with_our_configs(base, trainer_for, tmp_path, config):
    own = trainer_for(load(base), peft_config=config(task_type="CAUSAL_LM"))
    before = {n: m.metadata.clone() for n, m in sparse_linears(own.model)}
    own.train()
    assert losses(own)[-1] < losses(own)[0]
    assert all(torch.equal(m.metadata, before[n]) for n, m in sparse_linears(own.model))
    own.save_model(str(tmp_path / "adapter"))
    PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    wrapped = trainer_for(get_peft_model(load(base), config(task_type="CAUSAL_LM")))
    wrapped.train()
    assert losses(wrapped)[-1] < losses(wrapped)[0]


def test_extra_loss_adds_penalties_to_sft_trainer(base, trainer_for):
    class Penalised(ExtraLoss, SFTTrainer):
        pass

    found = {}
    for weight in (0.0, 100.0):
        torch.manual_seed(0)
        model = get_peft_model(load(base), SPPConfig(task_type="CAUSAL_LM"))
        factors = [p for name, p in model.named_parameters() if "spp_B" in name]
        trainer = trainer_for(model, Penalised)
        penalty = lambda weight=weight, factors=factors: weight * sum(f.square().sum() for f in factors)  # noqa: E731
        trainer.parts = TrainingParts(penalties=(penalty,))
        trainer.train()
        found[weight] = float(sum(f.detach().square().sum() for f in factors))
    assert found[100.0] < 0.5 * found[0.0]
