"""Run by every process of a launch: fine-tunings in one process group, and what each process saw of them.

    torchrun --nproc-per-node 2 ranks.py SPEC.json

SPEC: {"runs": [{"name", "options", "stop"}], "out": folder, "shard_on_cpus": bool}. Process r writes ``out/NAME.r.pt``.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from sparse_rt.config import FinetuneOptions
from sparse_rt.errors import SparseRTError
from sparse_rt.nn import sparse_linears
from sparse_rt.progress import Progress
from sparse_rt.training import run as run_module
from sparse_rt.training import sharding
from sparse_rt.workflows.finetune import finetune


def shard_on_cpus() -> None:
    """accelerate takes a plug-in for FSDP on accelerators only; here its state keeps it for processes on CPUs, too.

    Everything after that choice is theirs.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def __init__(self, *args, fsdp_plugin=None, **options):
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = __init__


def observe(seen: dict, trained):
    """Note this process's model at the end of training."""
    model = trained.trainer.accelerator.unwrap_model(trained.trainer.model)
    seen["sharded"] = sum(isinstance(p, DTensor) for p in model.parameters())
    seen["adapter"] = {n: sharding.whole(p) for n, p in model.named_parameters() if p.requires_grad}
    compressed = {
        f"{name.removeprefix('base_model.model.').removesuffix('.base_layer')}.{tensor}": getattr(module, tensor)
        for name, module in sparse_linears(model)
        for tensor in module.format.tensor_names
    }
    seen["base"] = {name: sharding.whole(tensor) for name, tensor in compressed.items()}
    seen["local"] = sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in compressed.values())
    return trained


class Stop(Progress):
    """Interrupts every process after ``steps`` training steps, or kills the first one (kill -9)."""

    def __init__(self, steps=None, kill=False):
        self.steps, self.kill = steps, kill

    def track(self, items, description, total=None):
        for done, item in enumerate(items):
            if done == self.steps:
                if not self.kill:
                    raise KeyboardInterrupt(f"after {done} steps")
                if os.environ["RANK"] == "0":
                    os.kill(os.getpid(), signal.SIGKILL)
            yield item


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    train = run_module.train
    rank = int(os.environ["RANK"])
    if spec["shard_on_cpus"]:
        shard_on_cpus()
    for run in spec["runs"]:
        seen: dict = {}
        run_module.train = lambda *given, seen=seen: observe(seen, train(*given))
        try:
            seen["result"] = finetune(FinetuneOptions(**run["options"]), Stop(**run["stop"]))
        except (SparseRTError, KeyboardInterrupt) as error:
            seen["error"] = str(error)
        torch.save(seen, Path(spec["out"]) / f"{run['name']}.{rank}.pt")


main()
