"""Every linear class of vLLM x tensor-parallel rank: the compressed piece equals the slice of the dense weight.

One process plays every rank: the three modules that ask for rank and size are told what to answer.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from helpers import random_weight
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.formats.int8 import dequantize, quantize
from sparse_rt.kernels import packed

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding

from sparse_rt.checkpoint import SparseConfig
from sparse_rt.exporters.vllm.config import SparseRTConfig
from sparse_rt.exporters.vllm.folders import CompressedTensorsFolder, DenseFolder, SparseFolder
from sparse_rt.exporters.vllm.linear_method import SparseRTLinearMethod

HEADS, KV_HEADS, HEAD_SIZE, COLUMNS, VOCABULARY = 8, 2, 4, 32, 100
RANKS = [(0, 1), (0, 2), (1, 2), (0, 4), (3, 4)]


@pytest.fixture
def ranks(monkeypatch):
    """Sets (rank, size) for the layers that are built afterwards."""

    def choose(rank: int, size: int) -> None:
        for module in (linear, parameter, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    with set_current_vllm_config(VllmConfig()):
        choose(0, 1)
        yield choose


def config(pattern, ignore=(), overrides=None, folder=None):
    described = {name: {"pattern": other} for name, other in (overrides or {}).items()}
    sparse = SparseConfig(pattern=pattern, ignore=list(ignore), overrides=described)
    made = SparseRTConfig(folder or SparseFolder(sparse))
    made.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    return made


def weight_and_mask(m, n, pattern, seed=0):
    """A weight with explicit zeros of both signs inside the mask and, where the pattern allows, an empty row."""
    weight = random_weight(m, n, pattern, 0.6, torch.bfloat16, seed)
    mask = get_format(pattern).mask_of(weight)
    if pattern == "unstructured":
        mask[1] = False
    kept = mask.nonzero()
    weight[~mask] = 0
    weight[tuple(kept[0])], weight[tuple(kept[-1])] = 0.0, -0.0
    return weight, mask


def build(kind, pattern, folder=None):
    """(layer, [(shard id or None, rows of the stored weight)], function (key, weight, rank, size) -> dense slice)."""
    options = dict(bias=False, params_dtype=torch.bfloat16, quant_config=config(pattern, folder=folder))

    def rows(key, weight, rank, size):
        return weight.chunk(size, 0)[rank]

    def heads(key, weight, rank, size):
        size = size if key == "q" else min(size, KV_HEADS)
        replicas = 1 if key == "q" else max(1, RANK.size // KV_HEADS)
        return weight.chunk(size, 0)[rank // replicas]

    if kind == "column":
        return linear.ColumnParallelLinear(COLUMNS, 48, prefix="m.fc1", **options), [((), 48)], rows
    if kind == "merged":
        layer = linear.MergedColumnParallelLinear(COLUMNS, [48, 80], prefix="m.gate_up_proj", **options)
        return layer, [((0,), 48), ((1,), 80)], rows
    if kind == "qkv":
        layer = linear.QKVParallelLinear(COLUMNS, HEAD_SIZE, HEADS, KV_HEADS, prefix="m.qkv_proj", **options)
        sizes = {"q": HEADS * HEAD_SIZE, "k": KV_HEADS * HEAD_SIZE, "v": KV_HEADS * HEAD_SIZE}
        return layer, [((name,), size) for name, size in sizes.items()], heads
    if kind == "row":
        columns = 88 if pattern == "unstructured" else 96  # 88 / 4 columns are no whole number of mask bytes
        layer = linear.RowParallelLinear(columns, 24, prefix="m.down_proj", **options)
        return layer, [((), 24)], lambda key, weight, rank, size: weight.chunk(size, 1)[rank]
    if kind == "replicated":
        layer = linear.ReplicatedLinear(COLUMNS, 24, prefix="m.gate", **options)
        return layer, [((), 24)], lambda key, weight, rank, size: weight
    options["quant_config"].folder.sparsities = {"lm_head": 0.5}
    head = vocab_parallel_embedding.ParallelLMHead(VOCABULARY, COLUMNS, prefix="lm_head", **options)
    return head, [((), VOCABULARY)], vocabulary_rows


def vocabulary_rows(key, weight, rank, size):
    """vLLM pads the vocabulary of 100 to 128 and gives every rank an equal part of that."""
    padded = torch.cat([weight, torch.zeros(128 - VOCABULARY, COLUMNS, dtype=weight.dtype)])
    return padded.chunk(size, 0)[rank]


RANK = SimpleNamespace(size=1)
KINDS = ["column", "merged", "qkv", "row", "replicated", "head"]


def load(layer, stored, pattern, masks_first):
    """Hand the tensors over as vLLM's loader does: through the parameter's own loader."""
    fmt = get_format(pattern)
    tensors = []
    for (ids, _), (weight, mask) in stored:
        tensors += [(name, ids, t) for name, t in zip(fmt.tensor_names, fmt.compress(weight, mask), strict=True)]
    # Metadata before values, and the shards in reverse: the order of the folder is not promised.
    load_tensors(layer, list(reversed(tensors)) if masks_first else tensors)


def load_tensors(layer, tensors):
    """[(name of the placeholder, shard ids, tensor)], in any order."""
    for name, ids, tensor in tensors:
        getattr(layer, name).weight_loader(getattr(layer, name), tensor, *ids)
    layer.quant_method.process_weights_after_loading(layer)


def canonical(layer):
    """Values and metadata of a loaded layer, which holds the derived layout of this processor instead."""
    return packed.unpack(layer.weight_packed, *layer.sparse_shape)


@pytest.mark.parametrize("masks_first", [False, True], ids=["values-first", "metadata-first"])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4:8"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank,size", RANKS)
def test_every_rank_keeps_its_slice_bit_for_bit(ranks, rank, size, kind, pattern, masks_first):
    ranks(rank, size)
    RANK.size = size
    layer, parts, cut = build(kind, pattern)
    columns = layer.input_size
    stored = [(part, weight_and_mask(part[1], columns, pattern, seed)) for seed, part in enumerate(parts)]
    load(layer, stored, pattern, masks_first)

    found_pattern, m, n = layer.sparse_shape
    expected = torch.cat([cut(*ids or (0,), weight, rank, size) for (ids, _), (weight, _) in stored])
    fmt = get_format(found_pattern)
    values, metadata = canonical(layer)
    assert torch.equal(fmt.decompress(values, metadata, m, n), expected)
    mask = fmt.unpack_mask(metadata, m, n)
    wanted = torch.cat([cut(*ids or (0,), mask, rank, size) for (ids, _), (_, mask) in stored]).bool()
    real = slice(None) if kind != "head" else slice(max(0, min(VOCABULARY - rank * m, m)))
    assert torch.equal(mask[real], wanted[real])  # padding rows of an N:M head keep explicit zeros

    x = torch.randn(3, n).bfloat16()
    product = x.double() @ expected.double().T
    assert (layer.quant_method.apply(layer, x).double() - product).norm() <= 4e-3 * product.norm()  # bf16 results
    assert {name for name, _ in layer.named_parameters()} == {"weight_packed"}


@pytest.mark.parametrize("kind", ["merged", "qkv"])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("rank,size", RANKS)
def test_shards_that_one_stored_weight_holds_are_cut_too(ranks, rank, size, pattern, kind):
    """Phi-3 stores qkv_proj and gate_up_proj joined: vLLM passes no shard id."""
    ranks(rank, size)
    RANK.size = size
    layer, parts, cut = build(kind, pattern)
    sizes = [rows for _, rows in parts]
    weight, mask = weight_and_mask(sum(sizes), COLUMNS, pattern)
    load(layer, [(((), None), (weight, mask))], pattern, False)
    pieces = [cut(*ids, part, rank, size) for (ids, _), part in zip(parts, weight.split(sizes), strict=True)]
    fmt, m, n = get_format(pattern), *layer.sparse_shape[1:]
    assert torch.equal(fmt.decompress(*canonical(layer), m, n), torch.cat(pieces))


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4:8"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank,size", RANKS)
def test_int8_values_are_widened_before_they_are_cut(ranks, rank, size, kind, pattern):
    ranks(rank, size)
    RANK.size = size
    fmt = get_format(pattern)
    layer, parts, cut = build(kind, pattern, SparseFolder(SparseConfig(pattern=pattern, values="int8", group_size=64)))
    tensors, weights = [], []
    for seed, (ids, rows) in enumerate(parts):
        shape = rows, layer.input_size
        values, metadata = fmt.compress(*weight_and_mask(*shape, pattern, seed))
        q, scales = quantize(fmt, values, metadata, *shape, 64)
        names = *fmt.tensor_names, "weight_scale"
        tensors += [(name, ids, t) for name, t in zip(names, (q, metadata, scales), strict=True)]
        widened = dequantize(fmt, q, scales, metadata, *shape, 64, torch.bfloat16)
        weights.append((ids, fmt.decompress(widened, metadata, *shape)))
    load_tensors(layer, tensors[::-1])
    found, m, n = layer.sparse_shape
    expected = torch.cat([cut(*ids or (0,), weight, rank, size) for ids, weight in weights])
    assert torch.equal(get_format(found).decompress(*canonical(layer), m, n), expected)
    assert {name for name, _ in layer.named_parameters()} == {"weight_packed"}


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank,size", RANKS)
def test_a_pruned_dense_weight_is_compressed_while_loading(ranks, rank, size, kind, pattern):
    ranks(rank, size)
    RANK.size = size
    layer, parts, cut = build(kind, pattern, DenseFolder())
    weights = [
        (ids, weight_and_mask(rows, layer.input_size, pattern, seed)[0]) for seed, (ids, rows) in enumerate(parts)
    ]
    load_tensors(layer, [("weight", ids, weight) for ids, weight in reversed(weights)])
    expected = torch.cat([cut(*ids or (0,), weight, rank, size) for ids, weight in weights])
    found, m, n = layer.sparse_shape
    values, metadata = canonical(layer)
    assert torch.equal(get_format(found).decompress(values, metadata, m, n), expected)
    if kind != "head":  # its padding rows are empty
        assert found == ("2:4" if pattern == "2:4" and n % 4 == 0 else "unstructured")
    assert {name for name, _ in layer.named_parameters()} == {"weight_packed"}


@pytest.mark.parametrize("kind", ["column", "qkv", "head"])
def test_a_weight_without_zeros_stays_dense(ranks, kind, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "VOCABULARY", 1000)  # padded to 1024: hardly any zeros
    layer, parts, _ = build(kind, "2:4", DenseFolder())
    weights = [torch.randn(rows, COLUMNS).bfloat16() for _, rows in parts]
    load_tensors(layer, [("weight", ids, weight) for (ids, _), weight in zip(parts, weights, strict=True)])
    assert not isinstance(layer.quant_method, SparseRTLinearMethod)
    x = torch.randn(3, COLUMNS).bfloat16()
    found = layer.quant_method.apply(layer, x)[:, : sum(map(len, weights))]
    wanted = x.double() @ torch.cat(weights).double().T
    assert (found.double() - wanted).norm() <= 4e-3 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored,pattern", [("sparse-bitmask", "unstructured"), ("sparse-24-bitmask", "2:4")])
@pytest.mark.parametrize("rank,size", RANKS)
def test_weights_of_compressed_tensors_are_cut_like_ours(ranks, rank, size, stored, pattern, kind):
    ranks(rank, size)
    RANK.size = size
    folder = CompressedTensorsFolder({"sparsity_config": {"format": stored}})
    layer, parts, cut = build(kind, pattern, folder)
    tensors, weights = [], []
    for seed, (ids, rows) in enumerate(parts):
        weight, mask = weight_and_mask(rows, layer.input_size, pattern, seed)
        shape = (rows, -1) if pattern == "2:4" else (-1,)
        tensors += [
            ("weight_values", ids, weight[mask].view(shape)),
            ("weight_bitmask", ids, get_format("unstructured").pack_mask(mask)),
        ]
        weights.append((ids, weight))
    load_tensors(layer, tensors)
    found, m, n = layer.sparse_shape
    assert found == pattern
    expected = torch.cat([cut(*ids or (0,), weight, rank, size) for ids, weight in weights])
    assert torch.equal(get_format(found).decompress(*canonical(layer), m, n), expected)


def test_a_promise_of_24_that_the_mask_breaks_is_named(ranks):
    layer, *_ = build("column", "2:4", CompressedTensorsFolder({"sparsity_config": {"format": "sparse-24-bitmask"}}))
    mask = get_format("2:4").mask_from_scores(torch.rand(48, COLUMNS))
    mask[5, 8:12] = torch.tensor([True, True, True, False])
    values = torch.randn(int(mask.sum())).bfloat16()
    bits = get_format("unstructured").pack_mask(mask)
    with pytest.raises(FormatError, match=r"m.fc1.bitmask: config.json promises 2:4, row 5, group 2 keeps 3 of 4"):
        load_tensors(layer, [("weight_values", (), values), ("weight_bitmask", (), bits)])


def test_a_rank_cannot_split_the_groups_of_a_row_parallel_weight(ranks):
    ranks(0, 4)
    with pytest.raises(UserError, match=r"m.down_proj: .* cannot be 2:4: 6 columns .*tensor-parallel-size"):
        linear.RowParallelLinear(24, 8, bias=False, quant_config=config("2:4"), prefix="m.down_proj")


def test_joined_layers_need_all_members_compressed_or_none(ranks):
    def build(ignore):
        options = dict(bias=False, quant_config=config("2:4", ignore), prefix="m.self_attn.qkv_proj")
        return linear.QKVParallelLinear(COLUMNS, HEAD_SIZE, HEADS, KV_HEADS, **options)

    with pytest.raises(UserError, match=r"joins m.self_attn.q_proj, .* m.self_attn.v_proj is stored dense"):
        build(["v_proj"])
    assert isinstance(build(["q_proj", "k_proj", "v_proj"]).quant_method, linear.UnquantizedLinearMethod)
    assert isinstance(build(["re:.*mlp.*"]).quant_method, SparseRTLinearMethod)


def test_joined_layers_may_have_members_of_different_patterns(ranks):
    made = config("2:4", overrides={"up_proj": "unstructured"})
    layer = linear.MergedColumnParallelLinear(
        COLUMNS, [48, 80], bias=False, params_dtype=torch.bfloat16, quant_config=made, prefix="m.gate_up_proj"
    )
    dense = []
    for key, (rows, pattern) in enumerate([(48, "2:4"), (80, "unstructured")]):
        weight, mask = weight_and_mask(rows, COLUMNS, pattern, key)
        fmt = get_format(pattern)
        for name, tensor in zip(fmt.tensor_names, fmt.compress(weight, mask), strict=True):
            getattr(layer, name).weight_loader(getattr(layer, name), tensor, key)
        dense.append(weight)
    layer.quant_method.process_weights_after_loading(layer)
    pattern, m, n = layer.sparse_shape
    found = get_format(pattern).decompress(*canonical(layer), m, n)
    assert torch.equal(found, torch.cat(dense))


def test_a_dense_weight_in_a_compressed_layer_says_what_to_do(ranks):
    layer, *_ = build("merged", "2:4")
    with pytest.raises(FormatError, match=r"unexpected tensor m.gate_up_proj.weight \(48, 32\).*`ignore`"):
        layer.weight.weight_loader(layer.weight, torch.zeros(48, COLUMNS), 0)


def test_a_tied_head_shares_the_embedding(ranks):
    layer, *_ = build("head", "2:4")
    embedding = vocab_parallel_embedding.VocabParallelEmbedding(VOCABULARY, COLUMNS, params_dtype=torch.bfloat16)
    assert layer.tie_weights(embedding) is layer
    assert layer.weight is embedding.weight and [name for name, _ in layer.named_parameters()] == ["weight"]
    assert isinstance(layer.quant_method, vocab_parallel_embedding.UnquantizedEmbeddingMethod)


def test_embeddings_and_uncompressed_heads_stay_as_they_are(ranks):
    made = config("2:4")
    made.folder.sparsities = {"model.layers.0.mlp.up_proj": 0.5}
    for cls in (vocab_parallel_embedding.VocabParallelEmbedding, vocab_parallel_embedding.ParallelLMHead):
        layer = cls(VOCABULARY, COLUMNS, quant_config=made, prefix="lm_head")
        assert isinstance(layer.quant_method, vocab_parallel_embedding.UnquantizedEmbeddingMethod)


def test_patterns_follow_the_renamings_of_the_model_class(ranks):
    from vllm.model_executor.models.utils import WeightsMapper

    made = config("2:4", ignore=["re:decoder.layers.0.*"])
    made._folder_names = {name: name for name in ("decoder.layers.0.fc1", "decoder.layers.1.fc1")}
    made.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"decoder.": "model.decoder."}))
    dense, sparse = (
        linear.ColumnParallelLinear(8, 8, bias=False, quant_config=made, prefix=f"model.decoder.layers.{i}.fc1")
        for i in range(2)
    )
    assert isinstance(dense.quant_method, linear.UnquantizedLinearMethod)
    assert isinstance(sparse.quant_method, SparseRTLinearMethod)
