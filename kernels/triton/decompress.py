"""The dense weight from the canonical tensors, and back: one program a tile, every byte read and written once."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rt.kernels.triton import configs
from sparse_rt.kernels.triton.language import BLOCK, cast, load_tile, store_tile
from sparse_rt.kernels.triton.tiles import on_device, rows_contiguous, tile_arguments

# 17 instructions a weight of a bitmask with 32 rows, 23 with 16 (what a row and a program need is shared by more).
DEFAULTS = {"decompress": dict(BN=32, num_warps=4, num_stages=1), "gather": dict(BN=32, num_warps=4, num_stages=1)}


@triton.jit
def decompress_kernel(
    values_ptr,
    meta_ptr,
    starts_ptr,
    offsets_ptr,
    out_ptr,
    m,
    n,
    meta_stride,
    BN: tl.constexpr,
    NIBBLES: tl.constexpr,
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row_mask = rows < m
    block = tl.program_id(1)
    weights = load_tile(
        values_ptr, meta_ptr, starts_ptr, offsets_ptr, rows, row_mask, block, m, n, meta_stride, BN, NIBBLES
    )
    columns = block * BLOCK + tl.arange(0, BLOCK)
    out = out_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out, cast(weights, out_ptr.dtype.element_ty), mask=row_mask[:, None] & (columns < n)[None, :])


@triton.jit
def gather_kernel(
    dense_ptr,
    meta_ptr,
    starts_ptr,
    offsets_ptr,
    values_ptr,
    m,
    n,
    stride_dense,
    meta_stride,
    BN: tl.constexpr,
    NIBBLES: tl.constexpr,
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row_mask = rows < m
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    dense = dense_ptr + rows.to(tl.int64)[:, None] * stride_dense + columns[None, :]
    weights = tl.load(dense, mask=row_mask[:, None] & (columns < n)[None, :], other=0.0)
    store_tile(
        weights, values_ptr, meta_ptr, starts_ptr, offsets_ptr, rows, row_mask, block, m, n, meta_stride, BN, NIBBLES
    )


def decompress(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor:
    """Dense [m, n] in the dtype of the values, zeros where nothing is kept."""
    out = torch.empty((m, n), dtype=values.dtype, device=values.device)
    return decompress_into(out, values, metadata, pattern)


def decompress_into(out: Tensor, values: Tensor, metadata: Tensor, pattern: str) -> Tensor:
    """Fill the contiguous ``out`` [m, n]; the values are rounded to its dtype."""
    m, n = out.shape
    if out.numel() == 0:
        return out
    weight = tile_arguments(metadata, pattern, m, n)
    options = configs.config("decompress", m, n, 0, out.device, **DEFAULTS["decompress"])
    with on_device(out):
        decompress_kernel[triton.cdiv(m, options["BN"]), triton.cdiv(n, BLOCK.value)](
            values.detach().contiguous(),
            weight.meta,
            weight.starts,
            weight.offsets,
            out,
            m,
            n,
            weight.meta_stride,
            NIBBLES=weight.nibbles,
            **options,
        )
    return out


def gather(dense: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor) -> Tensor:
    """The elements of dense [m, n] at the kept positions: shape of ``values_like``, dtype of ``dense``."""
    values = torch.empty(values_like.shape, dtype=dense.dtype, device=dense.device)
    if values.numel():
        gather_rows(rows_contiguous(dense.detach(), n), metadata, pattern, m, n, 0, values)
    return values


def gather_rows(dense: Tensor, metadata: Tensor, pattern: str, m: int, n: int, start: int, values: Tensor) -> None:
    """Put the elements of ``dense`` [rows, n], from row ``start`` of a weight (m, n) on, to their places in ``values``.

    values: those of the whole weight, contiguous, of the dtype of ``dense``, whose neighbouring columns are adjacent.
    """
    weight = tile_arguments(metadata, pattern, m, n)
    rows = dense.shape[0]
    options = configs.config("gather", rows, n, 0, dense.device, **DEFAULTS["gather"])
    with on_device(dense):
        gather_kernel[triton.cdiv(rows, options["BN"]), triton.cdiv(n, BLOCK.value)](
            dense,
            weight.meta[start:],
            weight.starts[start:],
            weight.offsets[start:],
            values[start:] if weight.nibbles else values,  # the starts of a bitmask count from the first row
            rows,
            n,
            dense.stride(0),
            weight.meta_stride,
            NIBBLES=weight.nibbles,
            **options,
        )


def compile_specs() -> list[configs.Spec]:
    """Both kernels, both kinds of metadata, every default and shipped configuration in bfloat16; float32 once."""
    specs = []
    for kernel, function in (("decompress", decompress_kernel), ("gather", gather_kernel)):
        shipped = configs.shipped(kernel)
        found = shipped if DEFAULTS[kernel] in shipped else [*shipped, DEFAULTS[kernel]]
        for options in found:
            for nibbles in (False, True):
                specs.append(_spec(kernel, function, "bf16", nibbles, options, options in shipped))
        specs.append(_spec(kernel, function, "fp32", False, DEFAULTS[kernel], False))
    # Adapters keep float32 values, which a product in bfloat16 expands.
    rounding = _spec("decompress", decompress_kernel, "fp32", False, DEFAULTS["decompress"], False)
    signature = {**rounding.signature, "out_ptr": "*bf16"}
    specs.append(dataclasses.replace(rounding, name=f"{rounding.name} to bf16", signature=signature))
    return specs


def _spec(kernel: str, function, dtype: str, nibbles: bool, options: dict, shipped: bool) -> configs.Spec:
    pointers = ("values_ptr", "out_ptr" if kernel == "decompress" else "dense_ptr")
    numbers = ("m", "n", "meta_stride", *(() if kernel == "decompress" else ("stride_dense",)))
    signature = {"meta_ptr": "*i32", "starts_ptr": "*i32" if nibbles else "*i64", "offsets_ptr": "*i32"}
    signature |= dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(numbers, "i32")
    return configs.Spec(
        name=f"{kernel}[{dtype},{'2:4' if nibbles else 'bitmask'},{options['BN']}w{options['num_warps']}]",
        kernel=function,
        signature=signature,
        constexprs={**configs.constexprs(options), "NIBBLES": nibbles},
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        weights_per_iteration=0,
        config=kernel if shipped else "",
        divisible=(*pointers, "meta_ptr", "starts_ptr", "offsets_ptr", *numbers),
    )
