"""Runs vLLM engines one after the other in one process, for the tests: `python vllm_scenarios.py REQUEST RESPONSE`.

The request maps a name to ``{"do": "tokens" | "inside" | "lora", ...}``; the response maps it to a result or an error.
"""

import json
import os
import sys
from pathlib import Path

from sparse_rt.exporters.vllm.engine import ENVIRONMENT, explain_failure, run_here

os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})


def tokens(scenario):
    return run_here({"jobs": [], "options": {}, **scenario})


def parameters(model):
    """Bytes of every parameter and the names of the layers that our method runs."""
    sparse = {n: m for n, m in model.named_modules() if type(getattr(m, "quant_method", None)).__name__ == METHOD}
    return {
        "bytes": {name: p.nbytes for name, p in model.named_parameters()},
        "sparse_layers": list(sparse),
        "packed": {name: layer.is_packed for name, layer in sparse.items()},
        "canonical": canonical_tensors([layer.sparse_shape for layer in sparse.values()]),
    }


def canonical_tensors(shapes):
    """Shapes of the tensors in this process that look like the values or metadata of a 2:4 weight of those shapes."""
    import gc

    import torch

    values, metadata = {(m, n // 2) for _, m, n in shapes}, {(m, n // 8) for _, m, n in shapes}
    gc.unfreeze()  # vLLM takes everything that is alive after loading out of the collector's sight
    alive = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    wanted = [t for t in alive if tuple(t.shape) in (metadata if t.dtype == torch.uint8 else values)]
    return [f"{t.dtype} {tuple(t.shape)}" for t in wanted]


METHOD = "SparseRTLinearMethod"


def inside(scenario):
    """What only code in the engine's process can see: the parameters, the imported packages, a refused reload."""
    with engine(scenario) as llm:
        found = llm.apply_model(parameters)[0]
        found["imported"] = [name for name in ("peft", "onnx", "click", METHOD) if name in sys.modules]
        try:
            llm.collective_rpc("reload_weights")
            found["reload"] = "accepted"
        except NotImplementedError as error:
            found["reload"] = str(error)
    return found


def lora(scenario):
    """Tokens with an adapter of PEFT's own format on the compressed layers."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    with engine(scenario) as llm:
        prompts = [{"prompt_token_ids": ids} for ids in scenario["prompts"]]
        request = LoRARequest("test", 1, scenario["adapter"])
        outputs = llm.generate(
            prompts,
            SamplingParams(temperature=0, max_tokens=scenario["max_tokens"]),
            use_tqdm=False,
            lora_request=request,
        )
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}


class engine:
    def __init__(self, scenario):
        self.folder, self.options = scenario["folder"], scenario["options"]

    def __enter__(self):
        import vllm

        self.llm = vllm.LLM(self.folder, max_model_len=128, **self.options)
        return self.llm

    def __exit__(self, *_):
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


def main(request: str, response: str) -> None:
    results = {}
    for name, scenario in json.loads(Path(request).read_text()).items():
        try:
            results[name] = {"tokens": tokens, "inside": inside, "lora": lora}[scenario.pop("do")](scenario)
        except Exception as error:
            results[name] = explain_failure(error)
        Path(response).write_text(json.dumps(results))  # after each, so that a crash shows how far it came


if __name__ == "__main__":
    main(*sys.argv[1:])
