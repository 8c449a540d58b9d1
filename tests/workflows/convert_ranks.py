"""Run by every process of a launch: conversions in one process group.

    torchrun --nproc-per-node 2 convert_ranks.py SPEC.json

SPEC: {"cases": {name: {"options", "fail"}}, "out": folder}. With "fail", process 1 cannot read that tensor. Process r
writes ``out/ranks.r.json``: name -> [class of the error, its text], or the mean reconstruction error and whether there
was a result.
"""

import json
import os
import sys
from pathlib import Path

import torch

from sparse_rt.config import ConvertOptions
from sparse_rt.conversion import Source
from sparse_rt.errors import UserError
from sparse_rt.workflows.convert import convert


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    spec, rank, found = json.loads(Path(sys.argv[1]).read_text()), int(os.environ["RANK"]), {}
    load, damaged = Source.load, None

    def read(source, key):
        if rank == 1 and key == damaged:
            raise UserError(f"{key} is damaged")
        return load(source, key)

    Source.load = read
    for name, case in spec["cases"].items():
        damaged = case.get("fail")
        try:
            result = convert(ConvertOptions.build(**case["options"]))
            found[name] = [result is not None, result and result.get("mean_reconstruction_error")]
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
    (Path(spec["out"]) / f"ranks.{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
