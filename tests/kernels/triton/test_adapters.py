"""Adapted layers train through the fused kernels: y, dx and all gradients equal those of plain torch."""

import pytest
import torch

import packed_cases
from sparse_rt.adapters.effective import Update, Weight, WeightShape, adapted_linear
from sparse_rt.adapters.masklora import MaskLoRAConfig, MaskLoRALayer
from sparse_rt.adapters.spp import SPPConfig, SPPLayer
from sparse_rt.kernels import factors, low_rank

ADAPTERS = {
    "spp": (SPPLayer, SPPConfig(groups=3, target_modules=["x"]), factors, ["apply", "apply", "gradients"]),
    "masklora": (MaskLoRALayer, MaskLoRAConfig(r=5, target_modules=["x"]), low_rank, ["gradients"]),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("case", [("2:4", 33, 264, None), ("unstructured", 33, 130, 0.7)], ids=str)
def test_an_adapted_layer_trains_through_its_kernels(device, monkeypatch, case, adapter):
    layer, config, module, expected_calls = ADAPTERS[adapter]
    monkeypatch.setenv("SPARSE_RT_BACKEND", "triton")
    w = packed_cases.weight(*case, torch.float32)
    weight = Weight.of(w.values.to(device), w.metadata.to(device), *w.shape)
    shape = WeightShape(w.m, w.n, w.pattern, w.values.numel())
    parameters = [torch.randn_like(p).to(device) for p in layer.new_parameters(config, shape)]
    x, dy = torch.randn(2, 9, w.n, device=device), torch.randn(2, 9, w.m, device=device)
    calls = []
    for name in set(expected_calls):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])

    def run(fused):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *parameters)]
        update = Update(lambda rows, *p: layer.update(config, rows, *p), tuple(leaves[1:]), fused)
        y = adapted_linear(leaves[0], weight, None, [update])
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    found = run(layer.fused(config))
    assert calls == expected_calls
    for one, other in zip(found, run(None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)  # sums of up to 264 products of normal numbers
    assert calls == expected_calls, "plain torch is what they are compared with"
    monkeypatch.setenv("SPARSE_RT_GPU_KERNELS", "none")
    calls.clear()
    for one, other in zip(run(layer.fused(config)), found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)
    assert "gradients" not in calls, "where it was not measured to be faster, dY^T X is formed by cuBLAS"
