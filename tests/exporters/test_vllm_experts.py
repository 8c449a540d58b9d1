"""vLLM's layer of all experts x tensor and expert parallelism: what the ranks add up to is the dense mixture."""

import pytest
import torch
import torch.nn.functional as F

from helpers import random_weight
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.formats.int8 import dequantize, quantize

pytest.importorskip("vllm")

from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe import config as moe_config

from sparse_rt.checkpoint import SparseConfig
from sparse_rt.exporters.vllm.config import SparseRTConfig
from sparse_rt.exporters.vllm.experts_method import SparseRTExpertsMethod
from sparse_rt.exporters.vllm.folders import CompressedTensorsFolder, DenseFolder, SparseFolder

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 6, 2, 32, 64
PARTS = {"w1": (INTERMEDIATE, HIDDEN), "w3": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE)}
RANKS = [(1, False), (2, False), (4, False), (2, True), (3, True)]


def folder(pattern, ignore=()):
    return SparseFolder(SparseConfig(pattern=pattern, ignore=list(ignore)))


def build(source, rank=0, size=1, expert_parallel=False, monkeypatch=None, **options):
    """The routed experts of one rank."""
    if monkeypatch is not None:
        monkeypatch.setattr(moe_config, "get_tensor_model_parallel_rank", lambda: rank)
    config = VllmConfig(parallel_config=ParallelConfig(enable_expert_parallel=expert_parallel))
    sizes = dict(num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)
    with set_current_vllm_config(config):
        runner = FusedMoEFactory(
            **sizes,
            params_dtype=torch.float32,
            quant_config=SparseRTConfig(source),
            tp_size=size,
            dp_size=1,
            pcp_size=1,
            prefix="m.experts",
            ckpt_names=("w1", "w2", "w3"),
            **options,
        )
    return runner.routed_experts


def weights(pattern, sparsity=0.6):
    """{(expert, part): dense weight}"""
    made = {}
    for expert in range(EXPERTS):
        for index, (part, shape) in enumerate(PARTS.items()):
            made[expert, part] = random_weight(*shape, pattern, sparsity, seed=10 * expert + index)
    return made


def stored(dense, pattern):
    """The tensors of a sparse-rt folder, names as the loader sees them below the prefix of the layer."""
    fmt = get_format(pattern)
    for (expert, part), weight in dense.items():
        for name, tensor in zip(fmt.tensor_names, fmt.compress(weight, fmt.mask_of(weight)), strict=True):
            yield f"{expert}.{part}.{name}", tensor


def load(layer, tensors):
    list(layer.load_weights(tensors))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def routing(tokens):
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    return torch.rand(tokens, TOP_K, generator=generator), ids.int()


def mixture(dense, x, scales, ids):
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token, (row, weight, chosen) in enumerate(zip(x.double(), scales.double(), ids.tolist(), strict=True)):
        for scale, expert in zip(weight, chosen, strict=True):
            gate, up = (dense[expert, part].double() @ row for part in ("w1", "w3"))
            y[token] += scale * (dense[expert, "w2"].double() @ (F.silu(gate) * up))
    return y


def summed(layers, x, scales, ids):
    """The all-reduce of vLLM."""
    return sum(layer.quant_method.apply(layer, x, scales, ids, None, None).double() for layer in layers)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "canonical"])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4:8"])
@pytest.mark.parametrize("size,expert_parallel", RANKS)
def test_the_ranks_add_up_to_the_mixture(monkeypatch, size, expert_parallel, pattern, packed):
    if not packed:
        monkeypatch.setenv("SPARSE_RT_BACKEND", "reference")
    dense = weights(pattern)
    layers = [
        load(build(folder(pattern), rank, size, expert_parallel, monkeypatch), stored(dense, pattern))
        for rank in range(size)
    ]
    assert all(isinstance(layer.quant_method, SparseRTExpertsMethod) for layer in layers)
    assert all(layer.is_packed == packed for layer in layers)
    x = torch.randn(7, HIDDEN)
    wanted = mixture(dense, x, *routing(7))
    assert (summed(layers, x, *routing(7)) - wanted).norm() <= 1e-6 * wanted.norm()
    kept = {name for layer in layers for name, _ in layer.named_parameters()}
    assert kept == {"w13_weight_packed", "w2_weight_packed"} | (
        set() if packed else {"w13_weight_metadata", "w2_weight_metadata"}
    )


def test_no_rank_holds_more_than_its_share(monkeypatch):
    dense = weights("2:4")
    sizes = {}
    for size, expert_parallel in RANKS:
        layer = load(build(folder("2:4"), 0, size, expert_parallel, monkeypatch), stored(dense, "2:4"))
        sizes[size, expert_parallel] = sum(p.nbytes for p in layer.parameters())
    for key, nbytes in sizes.items():
        assert nbytes < 1.6 * sizes[1, False] / key[0], sizes  # headers and padding of small weights
    assert sizes[1, False] < 0.75 * sum(weight.nbytes for weight in dense.values())


def test_experts_of_a_dense_folder_are_compressed_while_loading():
    dense = weights("unstructured", 0.7)
    tensors = [(f"{expert}.{part}.weight", weight) for (expert, part), weight in dense.items()]
    layer = load(build(DenseFolder()), tensors)
    x = torch.randn(5, HIDDEN)
    wanted = mixture(dense, x, *routing(5))
    assert (summed([layer], x, *routing(5)) - wanted).norm() <= 1e-6 * wanted.norm()


def test_experts_that_one_tensor_holds_are_compressed_too():
    """Newer folders store all experts of a block in two tensors with three dimensions."""
    dense = weights("2:4")
    gate_up = torch.stack([torch.cat([dense[e, "w1"], dense[e, "w3"]]) for e in range(EXPERTS)])
    down = torch.stack([dense[e, "w2"] for e in range(EXPERTS)])
    layer = load(build(DenseFolder()), [("w13", gate_up), ("w2", down)])
    x = torch.randn(5, HIDDEN)
    wanted = mixture(dense, x, *routing(5))
    assert (summed([layer], x, *routing(5)) - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("size,expert_parallel", RANKS)
def test_experts_with_int8_values(monkeypatch, size, expert_parallel, pattern):
    fmt, dense, tensors = get_format(pattern), weights(pattern), []
    for key, weight in dense.items():
        values, metadata = fmt.compress(weight, fmt.mask_of(weight))
        q, scales = quantize(fmt, values, metadata, *weight.shape)
        stored = zip((*fmt.tensor_names, "weight_scale"), (q, metadata, scales), strict=True)
        tensors += [(f"{key[0]}.{key[1]}.{name}", tensor) for name, tensor in stored]
        widened = dequantize(fmt, q, scales, metadata, *weight.shape, None, torch.float32)
        dense[key] = fmt.decompress(widened, metadata, *weight.shape)
    source = SparseFolder(SparseConfig(pattern=pattern, values="int8"))
    layers = [load(build(source, rank, size, expert_parallel, monkeypatch), tensors) for rank in range(size)]
    x = torch.randn(5, HIDDEN)
    wanted = mixture(dense, x, *routing(5))
    assert (summed(layers, x, *routing(5)) - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("kind,pattern", [("sparse-bitmask", "unstructured"), ("sparse-24-bitmask", "2:4")])
def test_experts_of_compressed_tensors(kind, pattern):
    dense = weights(pattern)
    bitmask = get_format("unstructured")
    tensors = []
    for (expert, part), weight in dense.items():
        values, mask = bitmask.compress(weight, get_format(pattern).mask_of(weight))
        shape = (weight.shape[0], -1) if pattern == "2:4" else (-1,)
        tensors += [(f"{expert}.{part}.weight_values", values.view(shape)), (f"{expert}.{part}.weight_bitmask", mask)]
    layer = load(build(CompressedTensorsFolder({"sparsity_config": {"format": kind}})), tensors)
    x = torch.randn(5, HIDDEN)
    wanted = mixture(dense, x, *routing(5))
    assert (summed([layer], x, *routing(5)) - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_missing_tensor_is_named_with_its_expert():
    tensors = [(name, tensor) for name, tensor in stored(weights("2:4"), "2:4") if name != "4.w3.weight_meta"]
    with pytest.raises(FormatError, match=r"m.experts.4.w13 is incomplete, missing m.experts.4.w3.weight_meta"):
        load(build(folder("2:4")), tensors)


def test_a_tensor_of_another_pattern_or_shape_is_named():
    with pytest.raises(FormatError, match=r"unexpected tensor m.experts.0.w1.weight_bitmask .* says 2:4"):
        load(build(folder("2:4")), stored(weights("unstructured"), "unstructured"))
    with pytest.raises(FormatError, match=r"unexpected tensor m.experts.2.w2.weight "):
        load(build(folder("2:4")), [("2.w2.weight", torch.zeros(HIDDEN, INTERMEDIATE))])
    broken = [(n, t[:-1] if n == "1.w2.weight_meta" else t) for n, t in stored(weights("2:4"), "2:4")]
    with pytest.raises(FormatError, match=r"m.experts.1.w2.weight_meta has shape"):
        load(build(folder("2:4")), broken)


def test_loaded_experts_cannot_be_loaded_again():
    dense = weights("2:4")
    layer = build(folder("2:4"))
    loader = layer.w13_weight_values.weight_loader
    load(layer, stored(dense, "2:4"))
    with pytest.raises(NotImplementedError, match="start a new engine"):
        loader(None, torch.zeros(1), "w13_weight_values", "w1", 0)


def test_experts_are_all_compressed_or_none():
    assert not isinstance(build(folder("2:4", ["re:.*experts.*"])).quant_method, SparseRTExpertsMethod)
    with pytest.raises(UserError, match=r"keeps all experts of m.experts in one layer, but m.experts.3.w1, .* dense"):
        build(folder("2:4", ["re:.*experts.3.*"]))


def test_what_compressed_experts_cannot_do_is_refused_before_loading(monkeypatch):
    with pytest.raises(UserError, match=r"experts of m.experts cannot be served: they have biases; export .* dense"):
        build(folder("2:4"), has_bias=True)
    with pytest.raises(UserError, match="activation is swigluoai"):
        build(folder("2:4"), activation="swigluoai")
    with pytest.raises(NotImplementedError, match="EPLB"):
        config = VllmConfig(parallel_config=ParallelConfig(enable_expert_parallel=True))
        config.parallel_config.enable_eplb = True
        with set_current_vllm_config(config):
            monkeypatch.setattr(moe_config, "get_tensor_model_parallel_rank", lambda: 0)
            sizes = dict(num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)
            FusedMoEFactory(
                **sizes,
                quant_config=SparseRTConfig(folder("2:4")),
                tp_size=2,
                dp_size=1,
                pcp_size=1,
                prefix="m.experts",
                ckpt_names=("w1", "w2", "w3"),
                enable_eplb=True,
            )


def test_dummy_weights_have_the_sparsity_of_the_folder(monkeypatch):
    from sparse_rt.exporters.vllm import experts_method

    monkeypatch.setattr(experts_method, "is_dummy", lambda: True)
    monkeypatch.setenv("SPARSE_RT_BACKEND", "reference")
    source = folder("unstructured")
    source.sparsities = {f"m.experts.{expert}.{part}": 0.75 for expert in range(EXPERTS) for part in PARTS}
    layer = build(source)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.w2_weight_packed.numel() == EXPERTS * HIDDEN * INTERMEDIATE / 4
    assert layer.w13_weight_packed.numel() == 2 * EXPERTS * HIDDEN * INTERMEDIATE / 4
