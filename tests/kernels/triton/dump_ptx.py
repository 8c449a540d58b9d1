"""Compile specs of mma_sp for one architecture and print {name: {"ptx": ..., "sass": ...}} as JSON.

A process of its own, without TRITON_INTERPRET. On standard input: JSON list of keyword arguments of ``mma_sp.spec``.
"""

from __future__ import annotations

import json
import sys

import compile_all

from sparse_rt.kernels.triton import mma_sp


def main() -> None:
    architecture, found = int(sys.argv[1]), {}
    for case in json.load(sys.stdin):
        spec = mma_sp.spec(**case)
        compiled = compile_all.compile_spec(spec, architecture)
        sass, usage = compile_all.machine_code(compiled.asm["cubin"])
        found[spec.name] = {
            "ptx": compiled.asm["ptx"],
            "shared": compiled.metadata.shared,
            "loop": compile_all.sass_loop(sass),
            "usage": usage,
            "weights": spec.weights_per_iteration,
            "warps": spec.num_warps,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
