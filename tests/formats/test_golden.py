"""The exact bytes of format version 1. These never change: version 1 is read by every later release."""

import pytest
import torch

from sparse_rt.formats import get_format
from sparse_rt.formats.int8 import dequantize, quantize

WEIGHT = [
    [1.0, 0.0, 0.0, 2.0, 0.0, 3.0, 4.0, 0.0, 0.0, 0.0, 5.0, 6.0],
    [0.0, 7.0, 8.0, 0.0, 9.0, 0.0, 0.0, -1.0, 0.0, -2.0, 0.0, 0.5],
]

GOLDEN = {
    # nibbles first | second << 2, low nibble first: (0,3)=12 (1,2)=9 -> 0x9c, (2,3)=14 -> 0x0e
    "2:4": ("3f80400040404080 40a040c0 40e04100 4110bf80 c0003f00", "9c0e c90d", (2, 6), (2, 2)),
    # bit j of byte b is column 8 b + j
    "unstructured": ("3f80400040404080 40a040c0 40e04100 4110bf80 c0003f00", "690c 960a", (12,), (2, 2)),
    "2:6": ("3f804000 40a040c0 40e04100 c0003f00", "090c 060a", (2, 4), (2, 2)),
}


def big_endian_words(tensor: torch.Tensor) -> str:
    """bfloat16 as it is read by eye: one four-digit word a value."""
    return "".join(f"{word & 0xFFFF:04x}" for word in tensor.flatten().view(torch.int16).tolist())


@pytest.mark.parametrize("pattern", GOLDEN)
def test_bytes_of_version_1(pattern):
    values_hex, metadata_hex, values_shape, metadata_shape = GOLDEN[pattern]
    fmt = get_format(pattern)
    weight = torch.tensor(WEIGHT, dtype=torch.bfloat16)
    if pattern == "2:6":  # keep two of every six columns: drop the two that the golden values leave out
        weight[0, 5] = weight[1, 4] = weight[1, 7] = weight[0, 6] = 0
    values, metadata = fmt.compress(weight, fmt.mask_of(weight))
    assert tuple(values.shape) == values_shape and tuple(metadata.shape) == metadata_shape
    assert big_endian_words(values) == values_hex.replace(" ", "")
    assert bytes(metadata.flatten().tolist()).hex() == metadata_hex.replace(" ", "")
    assert torch.equal(fmt.decompress(values, metadata, 2, 12), weight)


# Rows of 2:4 as above; the largest kept values are 6 and 9, so a scale is float32(6) / 127 and float32(9) / 127.
GOLDEN_INT8 = {
    # q = 1 2 3 4 5 6 times 127 / 6 = 21.17 42.33 63.5 84.67 105.83 127; 63.5 is a tie and goes to the even 64
    "2:4": ("152a40556a7f 63717ff2e407", (2, 6)),
    "unstructured": ("152a40556a7f 63717ff2e407", (12,)),
}


@pytest.mark.parametrize("pattern", GOLDEN_INT8)
@pytest.mark.parametrize("group_size", [None, 64])
def test_bytes_of_int8_values(pattern, group_size):
    q_hex, shape = GOLDEN_INT8[pattern]
    fmt = get_format(pattern)
    weight = torch.tensor(WEIGHT, dtype=torch.bfloat16)
    values, metadata = fmt.compress(weight, fmt.mask_of(weight))
    q, scales = quantize(fmt, values, metadata, 2, 12, group_size)
    assert tuple(q.shape) == shape and q.flatten().numpy().tobytes().hex() == q_hex.replace(" ", "")
    assert tuple(scales.shape) == (2, 1)
    assert [f"{word:08x}" for word in scales.view(torch.int32).flatten().tolist()] == ["3d418306", "3d912245"]
    widened = dequantize(fmt, q, scales, metadata, 2, 12, group_size, torch.bfloat16)
    assert big_endian_words(widened) == "3f7e3ffe4042408140a040c040e141004110bf7ebffe3efe"


@pytest.mark.parametrize(
    "group_size, q_hex, scales_hex",
    [
        # 1 / 127 and 2 / 127: q = 127 31.75 and 127 -31.75, rounded to 32 and -32
        (64, "7f20 7fe0", ["3c010204", "3c810204"]),
        # 2 / 127 for all: q = 63.5 15.875 127 -31.75; the tie goes to the even 64
        (None, "4010 7fe0", ["3c810204"]),
    ],
)
def test_bytes_of_int8_values_in_groups(group_size, q_hex, scales_hex):
    weight = torch.zeros(1, 66)
    weight[0, 0], weight[0, 1], weight[0, 64], weight[0, 65] = 1.0, 0.25, 2.0, -0.5
    fmt = get_format("unstructured")
    values, metadata = fmt.compress(weight, fmt.mask_of(weight))
    q, scales = quantize(fmt, values, metadata, 1, 66, group_size)
    assert q.numpy().tobytes().hex() == q_hex.replace(" ", "")
    assert [f"{word:08x}" for word in scales.view(torch.int32).flatten().tolist()] == scales_hex
    assert bytes(metadata.flatten().tolist()).hex() == "03" + 14 * "0" + "03"
