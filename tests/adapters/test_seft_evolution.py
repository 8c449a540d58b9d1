"""SEFT step by step against the same thing written densely in float64: positions, deltas, masks, optimizer state."""

from types import SimpleNamespace

import pytest
import torch
from seft_dense import DenseSEFT

import helpers
from sparse_rt.adapters.effective import BLOCK_ELEMENTS
from sparse_rt.adapters.seft import SEFTConfig, SEFTLayer
from sparse_rt.adapters.seft.evolve import Evolve
from sparse_rt.adapters.seft.optimizer import SparseAdamW
from sparse_rt.formats import get_format
from sparse_rt.kernels import positions
from sparse_rt.nn import SparseLinear

CASES = [
    ("unstructured", "unstructured", 16, 30),
    ("unstructured", "survivors", 16, 30),
    ("2:4", "survivors", 12, 32),
    ("2:4", "nm_swap", 12, 32),
    ("4:8", "nm_swap", 12, 32),
]
TOKENS, LR, DECAY = 9, 0.02, 0.1


class Run:
    """A layer trained with random inputs and output gradients, as the Trainer calls everything."""

    def __init__(self, pattern, mode, m, n, steps, sparsity=0.6, **options):
        torch.manual_seed(0)
        values, metadata, self.weight = helpers.compressed(m, n, pattern, sparsity=sparsity)
        fields = dict(density=0.1, interval=4, window=2, drop_rate=0.5, mode=mode)
        self.config = SEFTConfig(**{**fields, **options})
        self.layer = SEFTLayer(SparseLinear(n, m, pattern, values, metadata, None), "default", self.config)
        self.optimizer = SparseAdamW([self.delta], lr=LR, weight_decay=DECAY)
        self.evolve = Evolve({"layer": self.layer}, "default", self.config, self.optimizer)
        self.optimizer.extra = self.evolve.state, self.evolve.load
        self.state = SimpleNamespace(global_step=0, max_steps=steps)
        self.generator = torch.Generator().manual_seed(1)
        self.base = values.clone(), metadata.clone()

    @property
    def delta(self):
        return self.layer.seft_delta["default"]

    @property
    def positions(self):
        return self.layer.seft_positions["default"].tolist()

    def batch(self):
        """(x, dy) with heavy tails, so that some gradients stand out."""
        shapes = (TOKENS, self.layer.in_features), (TOKENS, self.layer.out_features)
        return [torch.randn(shape, generator=self.generator) ** 3 for shape in shapes]

    def step(self, batches=2, on_gradient=lambda first, gradient: None):
        self.evolve.on_step_begin(None, self.state, None)
        for number in range(batches):
            x, dy = self.batch()
            self.layer(x).backward(dy)
            on_gradient(number == 0, dy.double().T @ x.double())
            if number < batches - 1:
                self.evolve.on_substep_end(None, self.state, None)
        self.evolve.on_pre_optimizer_step(None, self.state, None)
        self.optimizer.step()
        self.delta.grad = None
        self.state.global_step += 1

    def end_step(self):
        self.evolve.on_step_end(None, self.state, None)


@pytest.mark.parametrize("pattern, mode, m, n", CASES)
def test_every_step_is_that_of_a_dense_implementation(pattern, mode, m, n, monkeypatch):
    tiles = 1 << 20 if mode == "survivors" else 100  # all rows at once, or a few
    monkeypatch.setitem(positions.TILE_ELEMENTS, "cpu", tiles)
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", tiles)
    run = Run(pattern, mode, m, n, steps=22)
    fmt, layer, config = get_format(pattern), run.layer, run.config
    mask = layer.base_layer.mask()
    dense = DenseSEFT(run.weight.double(), mask, run.positions, mode, LR, decay=DECAY, group=fmt.group)
    moved = set()
    while run.state.global_step < run.state.max_steps:
        step, steps = run.state.global_step + 1, run.state.max_steps
        gradients = []

        def see(first, gradient, dense=dense, gradients=gradients):
            gradients.append(gradient)
            if first and dense.window is not None and "grow" not in dense.window:
                dense.first_batch(gradient)

        if run.evolve.in_window(step, steps) and dense.window is None:
            dense.open()
        run.step(on_gradient=see)
        if dense.window is not None:
            dense.close_step(sum(gradients))
        dense.adam(sum(gradients))
        dense.weight_before = dense.weight().flatten().tolist()
        run.end_step()
        if run.state.global_step == steps:
            dense.finish()
        elif run.evolve.evolves(step, steps):
            share = config.drop_share(step, steps)
            count = int(share * len(dense.delta))
            if mode == "nm_swap":
                into = torch.tensor([dense.window["total"][p] for _, p in dense.window["pairs"]])
                rate = config.interval * LR / into.square().mean().sqrt().item()
                dense.swap(count, int(share * m * n / fmt.group), rate, config.interval + config.window)
            else:
                dense.evolve(count)
        assert run.positions == sorted(dense.delta), f"positions after step {step}"
        expected = torch.tensor([dense.delta[p] for p in run.positions])
        torch.testing.assert_close(run.delta.detach().double(), expected.double(), rtol=1e-4, atol=1e-6)
        held = run.optimizer.state_of(run.delta)
        for name, index in (("exp_avg", 0), ("exp_avg_sq", 1), ("age", 2)):
            expected = torch.tensor([dense.state[p][index] for p in run.positions]).double()
            torch.testing.assert_close(held[name].double(), expected, rtol=1e-4, atol=1e-5)
        base = layer.base_layer
        fmt.check_data("weight", base.values, base.metadata, m, n)  # N:M legal at every step
        assert base.mask().flatten().nonzero().flatten().tolist() == sorted(dense.support)
        x = torch.randn(3, n)
        torch.testing.assert_close(layer(x).double(), x.double() @ dense.weight().T, rtol=1e-3, atol=1e-4)
        moved |= set(run.positions)
    assert base.values.numel() == run.base[0].numel(), "the count is exact in the end"
    assert len(moved) > 1.5 * len(dense.delta) and bool(dense.removed) == (mode != "survivors")
    assert len(dense.removed) == len(dense.grown)
    restored(run)


def restored(run):
    """Without the adapter everything is as it was, bit for bit; with it again as before."""
    layer, base = run.layer, run.layer.base_layer
    evolved = base.values.clone(), base.metadata.clone()
    layer.enable_adapters(False)
    assert torch.equal(base.values, run.base[0]) and torch.equal(base.metadata, run.base[1])
    layer.enable_adapters(True)
    assert torch.equal(base.values, evolved[0]) and torch.equal(base.metadata, evolved[1])
    x = torch.randn(4, layer.in_features)
    before = layer(x)
    layer.merge()
    assert torch.equal(layer(x), before) and torch.equal(base.metadata, evolved[1])
    layer.unmerge()
    assert torch.equal(base.values, evolved[0]) and torch.equal(layer(x), before)
    layer.delete_adapter("default")
    assert torch.equal(base.values, run.base[0]) and torch.equal(base.metadata, run.base[1])
