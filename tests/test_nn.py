"""SparseLinear: built from a dense layer, found as nn.Linear, and clear about what it has not got."""

import pytest
import torch
from torch import nn

from helpers import random_weight
from sparse_rt.errors import FormatError, UserError
from sparse_rt.nn import SparseLinear, sparse_linears


def layer(pattern="2:4", m=12, n=16, bias=True):
    linear = nn.Linear(n, m, bias=bias)
    linear.weight.data = random_weight(m, n, pattern)
    return linear


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4:8"])
def test_equals_the_dense_layer_and_goes_back(pattern):
    dense = layer(pattern)
    sparse = SparseLinear.from_dense(dense, pattern)
    x = torch.randn(3, 16)
    torch.testing.assert_close(sparse(x), dense(x))
    assert torch.equal(sparse.to_dense().weight, dense.weight) and sparse.to_dense().bias is dense.bias
    assert sparse.nnz == 96 and sparse.sparsity == 0.5 and f"pattern={pattern}" in repr(sparse)
    assert isinstance(sparse, nn.Linear) and [name for name, _ in sparse_linears(nn.Sequential(sparse))] == ["0"]


def test_only_the_bias_trains_and_the_state_holds_no_dense_tensor():
    sparse = SparseLinear.from_dense(layer(), "2:4")
    assert [name for name, p in sparse.named_parameters() if p.requires_grad] == ["bias"]
    assert {name: tuple(t.shape) for name, t in sparse.state_dict().items()} == {
        "weight_values": (12, 8),
        "weight_meta": (12, 2),
        "bias": (12,),
    }


def test_a_mask_may_keep_explicit_zeros_but_must_fit_the_weight():
    dense = layer(bias=False)
    with pytest.raises(FormatError, match="nonzeros"):
        SparseLinear.from_dense(nn.Linear(16, 12), "2:4")
    mask = torch.ones(12, 16, dtype=torch.bool)
    full = SparseLinear.from_dense(dense, "unstructured", mask)
    assert full.nnz == 12 * 16 and torch.equal(full.decompress(), dense.weight)


def test_bad_weights_and_shapes_are_refused():
    dense = layer()
    dense.weight.data[2, 3] = float("nan")
    with pytest.raises(FormatError, match=r"nan at position \(2, 3\)"):
        SparseLinear.from_dense(dense, "2:4")
    with pytest.raises(UserError, match="30 columns are not a multiple of 4"):
        SparseLinear.from_dense(nn.Linear(30, 4), "2:4")


def test_the_missing_dense_weight_explains_itself():
    sparse = SparseLinear.from_dense(layer(), "2:4")
    with pytest.raises(AttributeError, match="no dense weight; use .values and .metadata, or .decompress"):
        sparse.weight  # noqa: B018
    assert not hasattr(sparse, "weight")
