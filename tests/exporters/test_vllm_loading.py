"""Staging, checking and cutting of stored weights: what a rank keeps, and what a damaged folder is told."""

import logging

import pytest
import torch

from helpers import compressed
from sparse_rt.errors import FormatError, UserError
from sparse_rt.exporters.vllm.encodings import Int8
from sparse_rt.exporters.vllm.loading import Cut, LayerWeight, Shard
from sparse_rt.formats import get_format
from sparse_rt.formats.int8 import dequantize, quantize


def layer(*patterns, rows=8, columns=32, dtype=torch.float32):
    shards = [Shard(f"m.{'qkv'[i]}_proj", pattern, rows) for i, pattern in enumerate(patterns)]
    return LayerWeight("m.qkv_proj", shards, columns, dtype, torch.device("cpu"))


def stage(weight, key, pattern, values, metadata, cut=None):
    for suffix, tensor in zip(get_format(pattern).tensor_names, (values, metadata), strict=True):
        weight.stage(suffix, tensor, {key: cut or weight.by_rows(key)})


def test_shards_of_different_patterns_are_joined_without_changing_a_value_or_a_mask():
    weight = layer("2:4", "unstructured", "4:8")
    parts = [compressed(8, 32, pattern, 0.7, seed=i) for i, pattern in enumerate(("2:4", "unstructured", "4:8"))]
    for key, (values, metadata, _) in enumerate(parts):
        stage(weight, key, weight.shards[key].pattern, values, metadata)
    joined = torch.cat([dense for *_, dense in parts])
    assert weight.format.pattern == "unstructured"
    assert torch.equal(weight.format.decompress(*weight.finish(), 24, 32), joined)


def test_missing_tensors_are_named_with_their_shard():
    weight = layer("2:4", "2:4")
    values, metadata, _ = compressed(8, 32, "2:4")
    stage(weight, 0, "2:4", values, metadata)
    weight.stage("weight_values", values, {1: weight.by_rows(1)})
    with pytest.raises(FormatError, match=r"layer m.qkv_proj is incomplete, missing m.k_proj.weight_meta \(shard 1\);"):
        weight.finish()
    with pytest.raises(FormatError, match=r"m.q_proj.weight_values, m.q_proj.weight_bitmask"):
        layer("unstructured").finish()


def test_a_tensor_that_comes_twice_or_belongs_to_another_pattern_is_refused():
    weight = layer("2:4")
    values, metadata, _ = compressed(8, 32, "2:4")
    weight.stage("weight_values", values, {0: weight.by_rows(0)})
    with pytest.raises(FormatError, match=r"m.q_proj.weight_values of layer m.qkv_proj was loaded twice"):
        weight.stage("weight_values", values, {0: weight.by_rows(0)})
    with pytest.raises(FormatError, match=r"unexpected tensor m.q_proj.weight_bitmask .* 2:4, which has weight_values"):
        weight.stage("weight_bitmask", metadata, {0: weight.by_rows(0)})
    weight.stage("weight_meta", metadata, {0: weight.by_rows(0)})
    with pytest.raises(FormatError, match="twice"):
        weight.stage("weight_meta", metadata, {0: weight.by_rows(0)})


def test_a_finished_layer_cannot_be_loaded_again():
    weight = layer("2:4")
    values, metadata, _ = compressed(8, 32, "2:4")
    stage(weight, 0, "2:4", values, metadata)
    weight.finish()
    with pytest.raises(NotImplementedError, match="reload_weights"):
        weight.stage("weight_values", values, {0: weight.by_rows(0)})


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_content_is_checked_against_the_format(pattern):
    values, metadata, _ = compressed(8, 32, pattern)
    flipped = metadata.clone()
    flipped[3, 1] ^= 1
    with pytest.raises(FormatError, match=r"m.q_proj.*weight_"):
        stage(layer(pattern), 0, pattern, values, flipped)
    broken = values.clone()
    broken.view(-1)[5] = float("nan")
    with pytest.raises(FormatError, match=r"m.q_proj.weight_values holds nan"):
        stage(layer(pattern), 0, pattern, broken, metadata)
    with pytest.raises(FormatError, match=r"m.q_proj.*has shape"):
        stage(layer(pattern), 0, pattern, values, metadata[:-1])
    with pytest.raises(FormatError, match=r"m.q_proj: values are torch.int8"):
        stage(layer(pattern), 0, pattern, values.to(torch.int8), metadata)


def quantized(pattern, group_size=64, columns=160, dtype=torch.bfloat16):
    """({tensor name: tensor}, the dense weight that they stand for)."""
    fmt = get_format(pattern)
    values, metadata, _ = compressed(8, columns, pattern, dtype=dtype)
    q, scales = quantize(fmt, values, metadata, 8, columns, group_size)
    widened = dequantize(fmt, q, scales, metadata, 8, columns, group_size, dtype)
    tensors = dict(zip((*fmt.tensor_names, "weight_scale"), (q, metadata, scales), strict=True))
    return tensors, fmt.decompress(widened, metadata, 8, columns)


def int8_layer(pattern, encoding, dtype=torch.bfloat16, columns=160):
    shard = Shard("m.q_proj", pattern, 8, encoding, "shard-1")
    return LayerWeight("m.qkv_proj", [shard], columns, dtype, torch.device("cpu"))


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4:8"])
@pytest.mark.parametrize("group_size", [None, 64, 128])
@pytest.mark.parametrize("part", [0, 1])
def test_int8_values_are_widened_and_cut_at_any_column(pattern, group_size, part):
    tensors, dense = quantized(pattern, group_size)
    weight = int8_layer(pattern, Int8(group_size, torch.bfloat16), columns=80)
    for suffix, tensor in reversed(tensors.items()):
        weight.stage(suffix, tensor, {0: weight.by_columns(part, 2)})
    values, metadata = weight.finish()
    assert values.dtype == torch.bfloat16
    assert torch.equal(weight.format.decompress(values, metadata, 8, 80), dense[:, 80 * part : 80 * (part + 1)])


def test_int8_values_are_rounded_to_the_dtype_of_the_header_and_without_one_to_that_of_the_layer():
    tensors, dense = quantized("2:4")
    for encoding, dtype in ((Int8(64, torch.bfloat16), torch.float32), (Int8(64), torch.bfloat16)):
        weight = int8_layer("2:4", encoding, dtype)
        for suffix, tensor in tensors.items():
            weight.stage(suffix, tensor, {0: weight.by_rows(0)})
        values, metadata = weight.finish()
        assert torch.equal(weight.format.decompress(values, metadata, 8, 160), dense.to(dtype))


def test_missing_scales_are_named():
    tensors, _ = quantized("2:4")
    weight = int8_layer("2:4", Int8(64))
    for suffix in ("weight_values", "weight_meta"):
        weight.stage(suffix, tensors[suffix], {0: weight.by_rows(0)})
    with pytest.raises(FormatError, match=r"layer m.qkv_proj is incomplete, missing m.q_proj.weight_scale;"):
        weight.finish()
    plain = layer("2:4", columns=160)
    with pytest.raises(FormatError, match=r"unexpected tensor m.q_proj.weight_scale .* 2:4, which has weight_values"):
        plain.stage("weight_scale", tensors["weight_scale"], {0: plain.by_rows(0)})


@pytest.mark.parametrize(
    "suffix, change, message",
    [
        ("weight_scale", lambda t: -t, r"shard-1: m.q_proj.weight_scale holds -.* at row 0, group 0"),
        ("weight_scale", lambda t: t[:, :1], r"m.q_proj.weight_scale is torch.float32 \(8, 1\).*needs .*\(8, 3\)"),
        ("weight_scale", lambda t: t.half(), "m.q_proj.weight_scale is torch.float16"),
        ("weight_values", lambda t: torch.full_like(t, -128), "m.q_proj.weight_values holds -128 at row 0"),
        ("weight_values", lambda t: t.bfloat16(), "m.q_proj.weight_values is torch.bfloat16"),
        ("weight_values", lambda t: t[:, 1:], r"m.q_proj.weight_values has shape \(8, 79\)"),
        ("weight_meta", lambda t: t.int(), "m.q_proj.weight_meta is torch.int32"),
        ("weight_meta", lambda t: t * 0, "m.q_proj.weight_meta: row 0, group 0"),
    ],
)
def test_malformed_int8_weights_are_refused_by_name(suffix, change, message):
    tensors, _ = quantized("2:4")
    tensors[suffix] = change(tensors[suffix])
    weight = int8_layer("2:4", Int8(64))
    with pytest.raises(FormatError, match=message):
        for name, tensor in tensors.items():
            weight.stage(name, tensor, {0: weight.by_rows(0)})


def test_a_cut_that_splits_groups_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match=r"m.q_proj: .*\(8, 6\) and cannot be 2:4.*tensor-parallel-size"):
        layer("2:4", columns=6)


def test_another_dtype_converts_values_once_and_keeps_the_mask(caplog):
    values, metadata, _ = compressed(8, 32, "unstructured")
    values[0], values[1] = 1e-30, -0.0  # both are zero in float16, both stay kept
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            weight = layer("unstructured", dtype=torch.float16)
            stage(weight, 0, "unstructured", values, metadata)
            cast, mask = weight.finish()
    assert torch.equal(cast, values.half()) and cast.numel() == values.numel() and torch.equal(mask, metadata)
    assert len([r for r in caplog.records if "converted" in r.message]) == 1
    with pytest.raises(UserError, match=r"m.q_proj.weight_values does not fit torch.float16"):
        stage(layer("unstructured", dtype=torch.float16), 0, "unstructured", values * 1e30, metadata)


def test_what_is_kept_does_not_share_memory_with_the_loader():
    values, metadata, dense = compressed(8, 32, "2:4")
    weight = layer("2:4")
    weight.stage("weight_values", values, {0: weight.by_rows(0)})
    values.zero_()
    weight.stage("weight_meta", metadata, {0: weight.by_rows(0)})
    metadata.zero_()
    assert torch.equal(weight.format.decompress(*weight.finish(), 8, 32), dense)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4:8"])
def test_missing_vocabulary_rows_are_padded_with_legal_empty_rows(pattern):
    values, metadata, dense = compressed(10, 32, pattern)
    weight = layer(pattern, rows=8)
    stage(weight, 0, pattern, values, metadata, Cut(10, 32, range(5, 10), range(32)))
    values, metadata = weight.finish()
    weight.format.check_data("padded", values, metadata, 8, 32)
    padded = torch.cat([dense[5:], torch.zeros(3, 32)])
    assert torch.equal(weight.format.decompress(values, metadata, 8, 32), padded)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_dummy_weights_are_legal_and_have_the_sparsity_of_the_folder(pattern):
    weight = layer(pattern, pattern, rows=64)
    weight.fill(0.75)
    values, metadata = weight.finish()
    weight.format.check_data("dummy", values, metadata, 128, 32)
    assert values.numel() == 128 * 32 * (0.5 if pattern == "2:4" else 0.25)
    assert 0 < values.abs().max() < 1e-2
