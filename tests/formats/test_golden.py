"""The exact bytes of format version 1. These never change: version 1 is read by every later release."""

import pytest
import torch

from sparse_rt.formats import get_format

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
