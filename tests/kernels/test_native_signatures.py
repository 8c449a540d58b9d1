"""What Python passes to a C function is what the function takes: ctypes cannot see a mistake, it crashes."""

import re
from importlib.resources import files

import pytest

from sparse_rt.kernels.native import library

COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
KINDS = (("const char *name", "s"), ("*", "p"), ("float ", "f"), ("int64_t ", "l"), ("int ", "i"))
RESULTS = {"int64_t": "l", "int": "i", "void": "v", "const char *": "s"}


def kind(argument):
    return next(letter for text, letter in KINDS if text in argument)


@pytest.fixture(scope="module")
def definitions():
    """Name -> (result, arguments) of every exported C function, as letters of ``library.SIGNATURES``."""
    csrc = files("sparse_rt.kernels.native").joinpath("csrc")
    text = "\n".join(COMMENT.sub("", path.read_text()) for path in csrc.iterdir() if path.name.endswith(".c"))
    exported = r'(?:EXPORT|__attribute__\(\(visibility\("default"\)\)\))\s+'
    found = {}
    for result, name, arguments in re.findall(exported + r"([\w ]+?[\s*]+)(srt_\w+)\(([^)]*)\)\s*\{", text):
        split = [] if arguments.strip() == "void" else arguments.split(",")
        found[name] = RESULTS[" ".join(result.split())], "".join(map(kind, split))
    return found


def test_every_signature_is_that_of_the_c_function(definitions):
    assert len(library.SIGNATURES) > 15
    for name, signature in library.SIGNATURES.items():
        result, _, arguments = signature.partition("=")
        assert (result.strip(), arguments.replace(" ", "")) == definitions[name], name
