"""``sparse-rt env``"""

import click

from sparse_rt.tools.command import COMMON
from sparse_rt.tools.console import check_json_target, show, table, write_json_result

LAYOUT = ("device", "dtype", "pattern")


def run(json_target: str | None, quiet: bool, debug: bool) -> None:
    from sparse_rt.workflows.environment import environment

    check_json_target(json_target)
    result = environment()
    write_json_result(result, json_target)
    if not quiet and json_target != "-":
        report(result)


def report(result: dict) -> None:
    facts = [(name, result[name]) for name in ("sparse_rt", "python", "platform", "cpu", "threads")]
    facts.append(("gpus", ", ".join(result["gpus"]) or "none"))
    facts += [(name, found or "not installed") for name, found in result["packages"].items()]
    facts.append(("vLLM plugin", "visible" if result["plugin_visible_to_vllm"] else "not visible: reinstall sparse-rt"))
    if result["forced_backend"]:
        facts.append(("SPARSE_RT_BACKEND", result["forced_backend"]))
    rows = [
        (
            row["device"],
            row["op"],
            row["pattern"],
            row["phase"],
            row["backend"] or "none",
            "; ".join(f"{name}: {reason}" for name, reason in row["refused"].items()),
        )
        for row in result["backends"]
    ]
    show(table("environment", ["", ""], facts))
    show_gpus(result)
    layouts = [
        (*(row[key] for key in LAYOUT), f"{row['sparsity']:.0%}", row["layout"] or "none", row["reason"])
        for row in result["layouts"]
    ]
    show(table("layouts of served weights", [*LAYOUT, "sparsity", "layout", "why"], layouts))
    show(table("backends", ["device", "op", "pattern", "phase", "backend", "why not the others"], rows))
    for problem in result["problems"]:
        show(f"problem: {problem}")


def show_gpus(result: dict) -> None:
    """What decides between the kernels of a GPU and the product with a dense weight."""
    found = result["gpu_dispatch"]
    facts = [("rule", found["rule"]), ("setting", f"{found['setting'] or 'none'}; {found['settings']}")]
    facts.append(("cuSPARSELt", found["cusparselt"]))
    facts += [
        (kernel, f"their kernel for any number of tokens; {said}") for kernel, said in found["always_used"].items()
    ]
    show(table("GPU kernels", ["", ""], facts))
    if not result["gpus"]:
        return
    used: dict[tuple, list[str]] = {}
    for row in found["kernels"]:
        used.setdefault((row["kernel"], row["used_for"]), []).append(
            row["pattern"] if ":" in row["pattern"] else f"{row['sparsity']:.0%}"
        )
    rows = [(kernel, ", ".join(weights), tokens) for (kernel, tokens), weights in used.items()]
    show(table("tokens for which a GPU kernel is used", ["kernel", "weights", "tokens"], rows))


command = click.Command(
    None,
    params=list(COMMON),
    callback=run,
    help="Versions, devices, and the backend chosen for each operation with the reasons of the others.",
)
