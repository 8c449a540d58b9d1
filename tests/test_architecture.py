"""The shape of the code base: imports go downward and stay cheap, packages match folders, files stay small."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("runtime", "kernels", "exporters", "tools")

BOTTOM = {"errors", "version", "registry", "optional", "progress", "config", "child"}
FORMATS = BOTTOM | {"formats"}
KERNELS = FORMATS | {"kernels"}
MODEL = KERNELS | {"nn", "checkpoint", "device", "assets", "data", "modelcard", "report", "hooks", "families"}

# Package or module of sparse_rt -> what it may import besides itself. What is not listed here is refused.
ALLOWED = {
    "errors": set(),
    "version": set(),
    "registry": {"errors"},
    "optional": {"errors"},
    "progress": set(),
    "child": {"errors"},
    "config": {"errors"},
    "hooks": {"errors"},
    "formats": {"errors", "registry"},
    "kernels": FORMATS,
    "nn": KERNELS,
    "checkpoint": FORMATS | {"version"},
    "device": {"errors"},
    "families": {"errors"},
    "assets": {"errors"},
    "data": BOTTOM | {"assets"},
    "modelcard": FORMATS | {"checkpoint"},
    "report": BOTTOM,
    "hf": MODEL,
    "adapters": KERNELS | {"nn", "hooks"},
    "pruning": KERNELS | {"nn", "data", "assets"},
    "conversion": MODEL | {"pruning"},
    "training": MODEL | {"hf", "adapters"},
    "exporters": MODEL | {"hf"},
    "benchmarking": MODEL | {"hf", "adapters", "exporters", "version"},
    "workflows": MODEL | {"hf", "adapters", "pruning", "conversion", "training", "exporters", "benchmarking"},
    "tools": BOTTOM | {"workflows", "report"},
    "": {"errors", "version", "hooks", "hf"},
    "__main__": {"tools"},
}
# Serving must not drag in the transformers integration or PEFT.
VLLM_ALLOWED = KERNELS | {"checkpoint", "exporters", "nn"}


def python_files():
    return [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]


def component(path: Path) -> str:
    """errors, formats, kernels, ... of a file; "" for the package's own __init__."""
    top, *rest = path.relative_to(ROOT).parts
    if top != "runtime":
        return top
    name = rest[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imports(path: Path, top_level_only: bool = False):
    """Modules that a file imports, as dotted names."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            if node.module == "sparse_rt":
                yield from (f"sparse_rt.{alias.name}" for alias in node.names)


def own_components(path: Path):
    for name in imports(path):
        if name.startswith("sparse_rt."):
            yield name.split(".")[1]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path):
    here = component(path)
    assert here in ALLOWED, f"{here}: a new component needs a line in ALLOWED (design first)"
    allowed = ALLOWED[here] | {here}
    if path.is_relative_to(ROOT / "exporters" / "vllm") and path.name not in ("exporter.py", "engine.py"):
        allowed = VLLM_ALLOWED
    upward = sorted(set(own_components(path)) - allowed)
    assert not upward, f"{path.relative_to(ROOT)} may not import {upward}"


def test_formats_need_torch_alone_and_nothing_is_imported_relatively():
    for path in python_files():
        tree = ast.parse(path.read_text())
        relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert not relative, f"{path}: write the full name of the module"
        if component(path) == "formats":
            foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
            assert foreign <= {"torch", "sparse_rt"}, path


def fresh(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")


def test_importing_the_package_is_cheap():
    heavy = ("torch", "transformers", "triton", "peft", "vllm", "onnx", "onnxruntime", "click", "datasets", "pydantic")
    done = fresh(f"import sys, sparse_rt; print([name for name in {heavy!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_help_does_not_import_torch():
    code = """
import sys
from sparse_rt.tools.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print("HEAVY", [name for name in ("torch", "transformers", "pydantic", "rich") if name in sys.modules])
"""
    assert "HEAVY []" in fresh(code).stdout


def test_option_classes_do_not_import_torch():
    done = fresh("import sys, sparse_rt.config; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_declared_packages_are_the_folders_on_disk():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in python_files()}
    expected = set()
    for folder in folders:
        top, *rest = folder.relative_to(ROOT).parts
        expected.add(".".join(["sparse_rt", *([] if top == "runtime" else [top]), *rest]))
    assert sorted(declared["packages"]) == sorted(expected)


def test_no_top_level_folder_can_shadow_a_package():
    """A kernels/__init__.py would shadow the Hugging Face package `kernels` and break transformers in a checkout."""
    for folder in ("kernels", "exporters", "tools"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_the_hugging_face_kernels_package_wins_over_our_folder(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("WHO = 'hugging face'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels, sparse_rt.kernels.ops; print(kernels.WHO)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "hugging face" and done.returncode == 0, done.stderr


def test_files_and_functions_stay_small():
    too_long = []
    for path in python_files():
        text = path.read_text()
        lines = len(text.splitlines())
        limit = 600 if path.is_relative_to(ROOT / "kernels") else 500
        if lines > limit:
            too_long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not too_long


def test_library_code_neither_prints_nor_asserts():
    for path in python_files():
        if component(path) == "tools":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: raise an error with a remedy"
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert called != "print", f"{path}:{node.lineno}: workflows return, the command line prints"
