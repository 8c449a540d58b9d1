"""The sparse tensor-core kernel, run: its PTX (sm_90) thread by thread, with the instruction from mma_sp_model.

What the compiler makes of it for the H200 is asserted too: one wide load and one instruction a tile, and nothing goes
through shared memory before the last sum.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ptx

pytest.importorskip("triton")

from sparse_rt.formats import get_format
from sparse_rt.kernels.triton import fragments, mma_sp

FORMAT = get_format("2:4")
# spec, (m, n), tokens
CASES = [
    (dict(), (32, 4096), 1),
    (dict(), (24, 2048), 8),
    (dict(row_tiles=2, warps=2, token_tiles=2, ragged=True, partial=True), (70, 1284), 13),
    (dict(warps=2, token_tiles=2, ragged=True), (20, 768), 16),
    (dict(dtype="fp16", warps=2, split=2, ragged=True, partial=True), (17, 1160), 3),
    (dict(dtype="fp16", warps=1, partial=True), (5, 60), 2),
]
SPECS = [case[0] for case in CASES[1:]]  # the first two share one


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """What dump_ptx.py says of every case."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("dump_ptx.py")), "90"],
        input=json.dumps(SPECS),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def launch(entry: dict, options: dict, values, metadata, x, bias, m: int, n: int) -> np.ndarray:
    """y [tokens, m] float64 of one launch (and the sum of its parts)."""
    packed = [part.numpy() for part in fragments.pack_fragments(values, metadata, m, n)]
    padded = F.pad(x, (0, -n % 8)).view(torch.int16).numpy()
    tokens, split = x.shape[0], options.get("split", 1)
    row_tiles, units = fragments.shapes(m, n)[1][:2]
    y = np.full((split, tokens, m), np.nan, np.float32) if split > 1 else torch.full((1, tokens, m), np.nan).to(x.dtype)
    written = y if split > 1 else y.view(torch.int16).numpy()
    programs = -(-row_tiles // options.get("row_tiles", 1))
    machine = ptx.Machine(ptx.parse(entry["ptx"]), (programs, split, 1), entry["warps"], entry["shared"])
    arguments = [*packed, padded.copy(), bias.view(torch.int16).numpy().copy(), written]
    machine.run([*arguments, m, tokens, padded.shape[1] // 8, row_tiles, units])
    return (y.sum(0) + bias.float().numpy() if split > 1 else y[0].double().numpy()).astype(np.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1][0]}x{case[1][1]},{case[2]}")
def test_the_compiled_kernel_multiplies(case, compiled):
    options, (m, n), tokens = case
    dtype = torch.float16 if options.get("dtype") == "fp16" else torch.bfloat16
    generator = torch.Generator().manual_seed(m)
    dense = torch.randn(m, n, generator=generator).to(dtype)
    values, metadata = FORMAT.compress(dense, FORMAT.mask_from_scores(torch.rand(m, n, generator=generator)))
    x = torch.randn(tokens, n, generator=generator).to(dtype)
    bias = torch.randn(m, generator=generator).to(dtype)
    got = launch(compiled[mma_sp.spec(**options).name], options, values, metadata, x, bias, m, n)
    expected = x.double() @ FORMAT.decompress(values, metadata, m, n).double().T + bias.double()
    error = np.linalg.norm(got - expected.numpy()) / expected.norm().item()
    # Parts stay float32; otherwise y is rounded once to its dtype.
    assert error < (1e-6 if options.get("split", 1) > 1 else 5e-4 if dtype == torch.float16 else 3e-3)


def test_infinities_of_x_do_not_leak_out_of_the_padding(compiled):
    """Columns beyond n have zero weights; x must not be read there, and pruned weights must not meet an infinity."""
    options, (m, n), tokens = CASES[5]
    values = torch.ones(m, n // 2, dtype=torch.float16)
    metadata = torch.full((m, -(-n // 8)), 0x44, dtype=torch.uint8)
    metadata[:, -1] &= 0x0F if n // 4 % 2 else 0xFF
    x = torch.ones(tokens, n, dtype=torch.float16)
    x[:, 2::4] = torch.inf
    entry = compiled[mma_sp.spec(**options).name]
    got = launch(entry, options, values, metadata, x, torch.zeros(m, dtype=torch.float16), m, n)
    assert (got == n // 2).all()


def test_a_wrong_selector_is_noticed(compiled):
    """The model is no tautology: other metadata threads give another product or undefined behaviour."""
    options, (m, n), tokens = CASES[0]
    entry = dict(compiled[mma_sp.spec(**options).name])
    assert ", 0x1;" in entry["ptx"]
    entry["ptx"] = entry["ptx"].replace(", 0x1;", ", 0x0;")
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(m, n, generator=generator).bfloat16()
    values, metadata = FORMAT.compress(dense, FORMAT.mask_from_scores(torch.rand(m, n, generator=generator)))
    x = torch.randn(tokens, n, generator=generator).bfloat16()
    got = launch(entry, options, values, metadata, x, torch.zeros(m).bfloat16(), m, n)
    expected = x.double() @ FORMAT.decompress(values, metadata, m, n).double().T
    assert np.linalg.norm(got - expected.numpy()) > 0.1 * expected.norm().item()


def test_the_main_loop_reads_wide_and_never_shuffles(compiled):
    for options, _, _ in CASES:
        entry = compiled[mma_sp.spec(**options).name]
        kinds = Counter(instruction.split()[0 if instruction[0] != "@" else 1] for instruction in entry["loop"])
        row_tiles, token_tiles = options.get("row_tiles", 1), options.get("token_tiles", 1)
        tensor_core = sum(count for kind, count in kinds.items() if kind.startswith("HMMA.SP.16832"))
        units = tensor_core / (8 * row_tiles * token_tiles)
        assert units >= 1 and units == int(units), (options, kinds)
        wide = sum(count for kind, count in kinds.items() if kind.startswith("LDG") and ".128" in kind)
        assert wide == units * (9 * row_tiles + 16 * token_tiles), (options, kinds)
        assert sum(count for kind, count in kinds.items() if kind.startswith("LDG")) == wide
        assert not [kind for kind in kinds if kind.startswith(("LDS", "STS", "BAR", "SHFL", "LDL", "STL"))]
        per_weight = len(entry["loop"]) * entry["warps"] * 32 / (units * entry["weights"])
        bound = 0.2 + (0.5 + 0.5 * options.get("partial", False)) * token_tiles / row_tiles
        assert per_weight < bound, (options, per_weight)
