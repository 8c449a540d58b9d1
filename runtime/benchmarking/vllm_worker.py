"""vLLM's worker, weighed while it loads a model; imported by name inside vLLM's processes alone."""

from __future__ import annotations

import time
from typing import Any

from vllm.platforms import current_platform

from sparse_rt.benchmarking.weights import LoadedWeights, held_bytes, record, tensor_bytes

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class WeighedWorker(Worker):
    """Records ``LoadedWeights`` and changes nothing else."""

    def load_model(self, *arguments: Any, **named: Any) -> None:
        before = held_bytes(self.device)
        start = time.perf_counter()
        super().load_model(*arguments, **named)
        seconds = time.perf_counter() - start
        after = held_bytes(self.device)
        if before is not None and after is not None:
            record(LoadedWeights(after - before, tensor_bytes(self.model_runner.get_model()), seconds))
