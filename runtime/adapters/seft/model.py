"""The PEFT tuner of SEFT: the budget of a model, and what a training run needs."""

from __future__ import annotations

import os
from collections.abc import Iterator

from torch import nn

from sparse_rt.adapters.base import SparseAdapterModel, base_of
from sparse_rt.adapters.parts import TrainingParts
from sparse_rt.adapters.registry import register_adapter
from sparse_rt.adapters.seft.config import SEFTConfig
from sparse_rt.adapters.seft.evolve import Evolve
from sparse_rt.adapters.seft.layer import SEFTLayer
from sparse_rt.adapters.seft.optimizer import SparseAdamW
from sparse_rt.errors import UserError
from sparse_rt.nn import SparseLinear


@register_adapter
class SEFTModel(SparseAdapterModel):
    name = "seft"
    prefix = "seft_"
    config_cls = SEFTConfig
    tuner_layer_cls = SEFTLayer
    # Tuned roughly on the shipped model (Wanda 60%, 60 steps): perplexity 12.41 before; 11.96 with 1e-3, 11.94 with
    # 3e-3, 12.74 with 1e-2. SpIEL searched 1e-4 to 3e-6 for 7B, whose weights are smaller.
    learning_rate = 1e-3
    promise = (
        "Merging keeps the number of kept weights of every matrix, and N:M; in the modes `unstructured` and `nm_swap` "
        "some of them are elsewhere than in the base model."
    )

    def _prepare_model(self, peft_config: SEFTConfig, model: nn.Module) -> None:
        """Turn the rank into a density: the parameters of LoRA on all targets, spread over them by their size."""
        super()._prepare_model(peft_config, model)
        if peft_config.density is None:
            targets = [
                base_of(module)
                for name, module in model.named_modules()
                if ".base_layer" not in name and self._check_target_module_exists(peft_config, name)
            ]
            shapes = [(layer.out_features, layer.in_features) for layer in targets if isinstance(layer, SparseLinear)]
            if shapes:
                share = peft_config.rank * sum(m + n for m, n in shapes) / sum(m * n for m, n in shapes)
                peft_config.density = min(share, 1.0)

    def unload(self) -> nn.Module:
        for _, layer in self._layers():
            if not layer.merged:
                layer.restore()
        return super().unload()

    def training_parts(self, arguments) -> TrainingParts:
        """An optimizer for deltas that move, and the callback that moves them."""
        _refuse(arguments)
        active = [name for name in self.active_adapters if name in self.peft_config]
        if len(active) != 1:
            raise UserError(f"SEFT trains one adapter at a time, active are {', '.join(active)}; use set_adapter")
        config = self.peft_config[active[0]]
        layers = {name: layer for name, layer in self._layers() if active[0] in layer.adapter_options}
        deltas = [layer.seft_delta[active[0]] for layer in layers.values()]
        others = {id(p): p for p in self.model.parameters() if p.requires_grad}
        others = [p for key, p in others.items() if key not in {id(delta) for delta in deltas}]
        groups = [
            {"params": deltas},
            {"params": [p for p in others if p.dim() > 1]},
            {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},  # norms and biases
        ]
        optimizer = SparseAdamW(
            [group for group in groups if group["params"]],
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            weight_decay=arguments.weight_decay,
        )
        evolve = Evolve(layers, active[0], config, optimizer)
        optimizer.extra = evolve.state, evolve.load
        return TrainingParts(callbacks=(evolve,), optimizer=optimizer)

    def _layers(self) -> Iterator[tuple[str, SEFTLayer]]:
        for name, module in self.model.named_modules():
            if isinstance(module, SEFTLayer):
                yield name, module


def _refuse(arguments) -> None:
    """``UserError`` for ways of training that SEFT has no part in."""
    sharded = getattr(arguments, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if sharded or getattr(arguments, "deepspeed", None):
        raise UserError(
            "SEFT moves positions of whole weights, which FSDP and DeepSpeed cut into shards; train it with DDP or on "
            "one device, or take another adapter"
        )
    if arguments.fp16:
        raise UserError("SEFT adds gradients up over steps, whose scale fp16 training changes; use bf16 or float32")
    if arguments.n_gpu > 1:
        raise UserError("SEFT trains on several GPUs with a process for each; start it with `accelerate launch`")
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if optimizer not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(f"SEFT brings its own AdamW, whose elements have an age each; leave optim out ({optimizer!r})")
