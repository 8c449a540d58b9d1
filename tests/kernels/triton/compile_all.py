"""Compile every GPU kernel for every architecture, without a GPU, and print what the machine code looks like (JSON).

    python tests/kernels/triton/compile_all.py                     # all kernels, all architectures
    python tests/kernels/triton/compile_all.py --only d4 --sass    # some kernels; their machine code to standard error
    python tests/kernels/triton/compile_all.py --record            # instructions per weight into compiled.json

A process of its own, because Triton cannot compile while TRITON_INTERPRET is set, and because a compiler bug may end
it. What is compiled: ``compile_specs()`` of every module of ``sparse_rt.kernels.triton``; ptxas, nvdisasm and cuobjdump
come with Triton.

Thread-instructions per dense weight are counted in the main loop: the innermost loop of the machine code with the most
instructions. ptxas may unroll a loop; the number of global loads and tensor-core instructions in the loop, divided by
their number in the PTX loop, says how often.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
RECORDED = Path(__file__).with_name("compiled.json")
# Its default changes between versions of Triton; recorded figures must not.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from sparse_rt.kernels import triton as kernels  # noqa: E402
from sparse_rt.kernels.triton import configs  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def modules() -> dict[str, object]:
    """Every module of the package by its short name."""
    found = (info.name for info in pkgutil.iter_modules(kernels.__path__))
    return {name: importlib.import_module(f"{kernels.__name__}.{name}") for name in found}


def jit_functions(module) -> dict[str, JITFunction]:
    """Functions with @triton.jit or @gluon.jit that ``module`` itself defines, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    }


def compile_spec(spec: configs.Spec, architecture: int):
    """Triton's compiled kernel."""
    arguments = list(spec.kernel.arg_names)
    unknown = sorted({*spec.signature, *spec.constexprs} ^ set(arguments))
    if unknown:
        raise ValueError(f"{spec.name}: arguments in the signature or in the kernel only: {unknown}")
    divisible = [name for name, kind in spec.signature.items() if kind.startswith("*")]
    divisible = divisible if spec.divisible is None else spec.divisible
    source = (GluonASTSource if spec.gluon else ASTSource)(
        fn=spec.kernel,
        signature={name: spec.signature.get(name, "constexpr") for name in arguments},
        constexprs=dict(spec.constexprs),
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if spec.gluon:
        options.pop("num_stages")
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def machine_code(cubin: bytes) -> tuple[str, dict[str, int]]:
    """The disassembly and registers, stack, local and shared memory of the kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run(
            # Without its analysis of data flow, of which nothing is read here, it takes 0.25 s instead of 0.35.
            [TOOLS / "nvdisasm", "-c", "-ndf", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage.stdout + usage.stderr))
    return sass, {name.lower(): int(found[name]) for name in ("REG", "STACK", "LOCAL", "SHARED")}


def innermost_loops(lines: list[str], label: str, branch: str) -> list[tuple[int, int]]:
    """(first, last) instruction of every loop that holds no other loop; lines are labels and instructions."""
    position, count, back = {}, 0, []
    for line in lines:
        at = re.match(label, line)
        if at:
            position[at.group(1)] = count
            continue
        jump = re.search(branch, line)
        if jump and jump.group(1) in position:
            back.append((position[jump.group(1)], count))
        count += 1
    return [loop for loop in set(back) if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in set(back))]


def sass_loop(sass: str) -> list[str]:
    """Instructions of the largest innermost loop of the machine code; [] without a loop."""
    lines = []
    for line in sass.splitlines():
        label = re.match(r"^\s*(\.L_x_\d+):", line)
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label or instruction:
            lines.append(label.group(0).strip() if label else instruction.group(1).strip())
    instructions = [line for line in lines if not line.endswith(":")]
    loops = innermost_loops(lines, r"(\.L_x_\d+):", r"BRA.*?`\((\.L_x_\d+)\)")
    # A spin on itself (the end of every kernel) is no loop.
    bodies = [instructions[first : last + 1] for first, last in loops if last > first]
    return max(bodies, key=len, default=[])


def ptx_loop(ptx: str) -> list[str]:
    """As ``sass_loop``, of the PTX."""
    lines = [line.strip() for line in ptx.splitlines()]
    lines = [line for line in lines if line.endswith((";", ":")) or re.match(r"\$L__BB\w+:", line)]
    instructions = [line for line in lines if not re.match(r"\$L__BB\w+:", line)]
    loops = innermost_loops(lines, r"(\$L__BB\w+):", r"\bbra(?:\.uni)?\s+(\$L__BB\w+)")
    return max((instructions[first : last + 1] for first, last in loops), key=len, default=[])


def opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def unrolled(loop: list[str], ptx: list[str]) -> int:
    """How often ptxas repeated the body of the PTX loop; 1 where that cannot be told."""
    for of_sass, of_ptx in (
        (r"^(HMMA|HGMMA|QGMMA|UTCHMMA)", r"\b(mma\.sync|mma\.sp|wgmma\.mma_async|tcgen05\.mma)"),
        (r"^(LDG|LD)\b", r"\bld\.global"),
    ):
        in_sass = sum(bool(re.match(of_sass, opcode(line))) for line in loop)
        in_ptx = sum(bool(re.search(of_ptx, line)) for line in ptx)
        if in_ptx and in_sass and in_sass % in_ptx == 0:
            return in_sass // in_ptx
    return 1


def missing(spec: configs.Spec, architecture: int, opcodes: Counter) -> list[str]:
    """What ``spec.expects`` names and the machine code lacks."""
    lacking = []
    for expectation in spec.expects:
        where, _, names = expectation.rpartition(":")
        if where and int(where) != architecture:
            continue
        if not any(found.startswith(tuple(names.split("|"))) for found in opcodes):
            lacking.append(expectation)
    return lacking


def examine(spec: configs.Spec, architecture: int, show: bool = False) -> dict:
    """One row: what the compiler made of ``spec``, or its error."""
    row = {"name": spec.name, "architecture": architecture}
    start = time.perf_counter()
    try:
        compiled = compile_spec(spec, architecture)
        sass, usage = machine_code(compiled.asm["cubin"])
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
    opcodes = Counter(opcode(line) for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", sass))
    loop = sass_loop(sass)
    row |= {"seconds": round(time.perf_counter() - start, 2), "instructions": sum(opcodes.values())} | usage
    row |= {"shared": compiled.metadata.shared, "missing": missing(spec, architecture, opcodes)}
    row |= {"tensor_core": sorted({name for name in opcodes if re.match(r"[HQ]G?MMA|UTC\w*MMA", name)})}
    if spec.weights_per_iteration:
        times = unrolled(loop, ptx_loop(compiled.asm["ptx"]))
        row |= {"loop": len(loop), "unrolled": times}
        row |= {"per_weight": round(len(loop) * spec.num_warps * 32 / (times * spec.weights_per_iteration), 4)}
    if show:
        kinds = Counter(opcode(line).split(".")[0] for line in loop)
        print(f"// {row}\n// loop: {dict(kinds.most_common())}\n{sass}", file=sys.stderr, flush=True)
    return row


def uncovered_functions(found: dict[str, object], specs: list[configs.Spec]) -> list[str]:
    """JIT functions of the package that no Spec compiles and no other JIT function mentions."""
    functions = {f"{module}.{name}": f for module in found for name, f in jit_functions(found[module]).items()}
    compiled = {id(spec.kernel) for spec in specs}
    sources = {name: inspect.getsource(function.fn) for name, function in functions.items()}

    def used(name: str) -> bool:
        word = re.compile(rf"\b{re.escape(name.rpartition('.')[2])}\b")
        return any(word.search(source) for other, source in sources.items() if other != name)

    return sorted(name for name, function in functions.items() if id(function) not in compiled and not used(name))


def uncovered_configurations(specs: list[configs.Spec]) -> list[str]:
    """Shipped configurations that no Spec compiles."""
    lacking = []
    for file in configs.files():
        for kernel, rows in configs.read(file).get("kernels", {}).items():
            for row in rows:
                wanted = row["options"].items()
                given = [
                    {**spec.constexprs, "num_warps": spec.num_warps, "num_stages": spec.num_stages}
                    for spec in specs
                    if spec.config == kernel
                ]
                if not any(wanted <= options.items() for options in given):
                    lacking.append(f"{file}: {kernel} {row['options']}")
    return lacking


def _examine(job: tuple[int, int]) -> dict:
    index, architecture = job
    return examine(_specs[index], architecture)


_specs: list[configs.Spec] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="specs whose name contains this")
    parser.add_argument("--architecture", type=int, action="append", help=f"default: {ARCHITECTURES}")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sass", action="store_true", help="machine code to standard error")
    parser.add_argument("--record", action="store_true", help="write the instructions per weight into compiled.json")
    options = parser.parse_args()

    found = modules()
    specs = [spec for module in found.values() if hasattr(module, "compile_specs") for spec in module.compile_specs()]
    names = Counter(spec.name for spec in specs)
    report = {
        "triton": triton.__version__,
        "specs": {
            name: len(module.compile_specs()) for name, module in found.items() if hasattr(module, "compile_specs")
        },
        "repeated_names": sorted(name for name, count in names.items() if count > 1),
        "uncovered_functions": uncovered_functions(found, specs),
        "uncovered_configurations": uncovered_configurations(specs),
    }
    _specs[:] = [spec for spec in specs if options.only in spec.name]
    architectures = options.architecture or ARCHITECTURES
    # All architectures of a spec one after the other: Triton's front end is the same for them.
    jobs = [
        (index, architecture)
        for index, spec in enumerate(_specs)
        for architecture in architectures
        if not spec.architectures or architecture in spec.architectures
    ]
    if options.sass or options.processes < 2:
        report["rows"] = [examine(_specs[index], architecture, options.sass) for index, architecture in jobs]
    else:
        with ProcessPoolExecutor(options.processes, mp_context=get_context("fork")) as pool:
            report["rows"] = list(pool.map(_examine, jobs))
    print(json.dumps(report, indent=1))
    if options.record:
        record(report, everything=not options.only and not options.architecture)


def record(report: dict, everything: bool) -> None:
    """A partial run keeps what is on record of other specs; a complete one drops specs that are gone."""
    held = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    keep = not everything and held.get("triton") == report["triton"]
    per_weight = held.get("per_weight", {}) if keep else {}
    for row in report["rows"]:
        if "per_weight" in row:
            per_weight.setdefault(row["name"], {})[str(row["architecture"])] = row["per_weight"]
    content = {"triton": report["triton"], "per_weight": dict(sorted(per_weight.items()))}
    RECORDED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
