"""Entry point of vLLM's plugin group ``vllm.general_plugins``: makes the quantization method ``sparse_rt`` known.

vLLM calls ``register`` in every process (front end, engine core, workers) and for every model, sparse or not, and may
call it twice. So it only imports the module whose decorators register, and a vLLM that this build does not fit must not
stop the serving of other models: the reason is logged, and only sparse-rt folders are refused.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

# Versions the tests ran against; vLLM changes its layer interface about once a month.
TESTED_FROM, TESTED_BELOW = (0, 32), (0, 33)


def register() -> None:
    """Register ``SparseRTConfig``; harmless when repeated, never raises."""
    try:
        import vllm

        from sparse_rt.exporters.vllm import failures

        failures.watch()
        note = version_note(vllm.__version__)
        if note:
            logger.warning("%s", note)
        import sparse_rt.exporters.vllm.config  # noqa: F401  (its decorators register)
    except Exception:
        logger.exception("sparse-rt could not register with vLLM; sparse-rt folders cannot be served in this process")


def version_note(version: str) -> str | None:
    """What to say about ``version`` of vLLM when it is outside the tested range, else None."""
    try:
        release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    except ValueError:
        release = ()
    if TESTED_FROM <= release < TESTED_BELOW:
        return None
    tested = f"{'.'.join(map(str, TESTED_FROM))} up to (not including) {'.'.join(map(str, TESTED_BELOW))}"
    return f"sparse-rt is tested with vLLM {tested}; this is {version}, so check the output before relying on it"
