"""What SEFT reads off the gradient, by the kernels and by blocks of rows: the same positions, the same sums."""

import pytest
import torch

import packed_cases
from sparse_rt.formats import get_format
from sparse_rt.kernels import positions


@pytest.mark.parametrize("case", [("2:4", 33, 264, None), ("unstructured", 33, 130, 0.7)], ids=str)
def test_kernels_and_blocks_of_rows_agree(device, monkeypatch, case):
    w = packed_cases.weight(*case, torch.float32)
    metadata = w.metadata.to(device)
    x, dy = torch.randn(9, w.n, device=device), torch.randn(9, w.m, device=device)
    dense = dy.double().T @ x.double()
    chosen = torch.randperm(w.m * w.n)[:300].sort().values.to(torch.int32).to(device)
    for backend in ("triton", "reference"):
        monkeypatch.setenv("SPARSE_RT_BACKEND", backend)
        found = positions.gradient(dy, x, positions.Chosen(chosen, w.pattern, w.m, w.n))
        torch.testing.assert_close(found.double(), dense.flatten()[chosen.long()], rtol=1e-4, atol=1e-4)
    assert positions.largest(dy, x, metadata, w.pattern, w.m, w.n, 100, pruned=True) is None
    monkeypatch.setenv("SPARSE_RT_BACKEND", "triton")
    found = positions.largest(dy, x, metadata, w.pattern, w.m, w.n, 100, pruned=True)
    assert torch.equal(found, dense.abs().flatten().topk(100).indices.sort().values)
    found = positions.largest(dy, x, metadata, w.pattern, w.m, w.n, 100, pruned=False)
    kept = get_format(w.pattern).unpack_mask(metadata, w.m, w.n)
    assert torch.equal(found, (dense.abs() * kept).flatten().topk(100).indices.sort().values)
