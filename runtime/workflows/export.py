"""``sparse-rt export``: a sparse-rt folder becomes the artefact of a serving engine, checked there on request."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sparse_rt.checkpoint import Checkpoint, is_sparse_checkpoint, output_directory, resolve_model
from sparse_rt.config import ExportOptions
from sparse_rt.conversion.files import refuse_same_folder
from sparse_rt.errors import CheckFailed, UserError
from sparse_rt.progress import Progress

# What holds weights in an export; tokenizer, configuration and README do not count for compression.
_WEIGHT_FILES = (".safetensors", ".onnx", ".onnx.data")


def export(options: ExportOptions, progress: Progress = Progress()) -> dict[str, Any]:  # noqa: B008 (stateless)
    """Run the exporter ``options.to``; returns files and bytes, compression, facts of the exporter, check, seconds.

    An error leaves nothing behind. A failed ``options.check`` keeps the artefact, for a look at it, and raises
    ``CheckFailed``. ``UserError`` for an unknown exporter, option or a model that sparse-rt did not compress.
    """
    from sparse_rt.exporters.base import EXPORTERS
    from sparse_rt.exporters.folder import file_sizes

    exporter = EXPORTERS.get(options.to)()
    source = resolve_model(options.model)
    if not is_sparse_checkpoint(source):
        raise UserError(
            f"{options.model} is not a sparse-rt model, so there is nothing compressed to export; make one with "
            "`sparse-rt convert MODEL -o DIR`"
        )
    refuse_same_folder(source, Path(options.output_dir))
    checkpoint = Checkpoint.open(source)
    begin = time.perf_counter()
    failure: CheckFailed | None = None
    figures: dict[str, Any] | None = None
    with output_directory(options.output_dir, options.overwrite) as partial:
        progress.stage(f"export to {options.to}")
        facts = exporter.export(source, partial, **options.options)
        exported = time.perf_counter()
        if options.check:
            progress.stage(f"check in {options.to}")
            try:
                figures = exporter.check(source, partial)
            except CheckFailed as error:
                failure = error
        files = file_sizes(partial)
    result = {
        "exporter": options.to,
        "output_dir": str(Path(options.output_dir)),
        "files": files,
        "bytes": sum(files.values()),
        **_sizes(checkpoint, sum(size for name, size in files.items() if name.endswith(_WEIGHT_FILES))),
        "facts": facts,
        "check": figures,
        "seconds": {"export": exported - begin, "check": time.perf_counter() - exported if options.check else None},
    }
    if failure is not None:
        message = f"{failure}; the export stays in {options.output_dir}, do not serve it"
        raise CheckFailed(message, result | {"check": failure.result}) from failure
    return result


def _sizes(checkpoint: Checkpoint, written: int) -> dict[str, Any]:
    """Weight bytes of the source, of the same model stored dense, and as written; compression is dense / written."""
    saved = sum(entry.dense_bytes - checkpoint.stored_bytes(name) for name, entry in checkpoint.weights.items())
    dense = checkpoint.total_bytes + saved
    return {
        "source_bytes": checkpoint.total_bytes,
        "dense_bytes": dense,
        "weight_bytes": written,
        "compression": dense / written,
    }
