"""The pattern that zeros obey, against a count in plain Python over every group."""

import pytest
import torch

from sparse_rt.checkpoint import SparseConfig
from sparse_rt.conversion.detect import Detected, detect
from sparse_rt.conversion.overrides import compact_overrides
from sparse_rt.formats import get_format

EXACT = ("2:4", "1:4", "4:8", "2:8", "5:8", "3:16", "8:32", "16:32", "3:4")


def mask(pattern, m=256, n=96, sparsity=0.5, seed=0):
    scores = torch.rand(m, n, generator=torch.Generator().manual_seed(seed))
    return get_format(pattern).mask_from_scores(scores, sparsity)


@pytest.mark.parametrize("pattern", EXACT)
@pytest.mark.parametrize("m", [256, 129, 3])
def test_exact_patterns_are_named(pattern, m):
    kept = mask(pattern, m)
    kept_of, group = (int(part) for part in pattern.split(":"))
    assert all(sum(kept[row, at : at + group].tolist()) == kept_of for row in range(m) for at in range(0, 96, group))
    assert detect(kept) == Detected(pattern, int(kept.sum()))


@pytest.mark.parametrize("sparsity", [0.16, 0.5, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("n", [96, 98, 99])
def test_zeros_anywhere_are_unstructured(sparsity, n):
    kept = mask("unstructured", 64, n, sparsity)
    assert detect(kept) == Detected("unstructured", int(kept.sum()))


@pytest.mark.parametrize("m", [1, 4, 130, 256])
def test_every_group_counts_also_in_the_last_row(m):
    kept = mask("2:4", m)
    kept[-1, -4:] = True
    assert detect(kept).pattern == "unstructured"
    kept[-1, -4:] = torch.tensor([True, True, True, False])
    assert detect(kept).pattern == "unstructured"


def test_2_4_with_more_zeros_stays_2_4():
    kept = mask("2:4")
    kept[:100] = False  # rows of zeros
    assert detect(kept).pattern == "2:4"
    kept = mask("2:4") & mask("unstructured", sparsity=0.4, seed=1)  # pruned further: most groups hold one or none
    counts = kept.view(-1, 4).sum(1)
    assert (counts == 2).sum() < (counts > 0).sum() / 2 and detect(kept).pattern == "2:4"


def test_nearly_empty_weights_are_unstructured():
    """Groups of four with at most one nonzero, and no N:M meant: as 1:4 it would take eight times the values."""
    kept = torch.zeros(256, 96, dtype=torch.bool)
    kept[:, ::32] = True
    assert detect(kept) == Detected("1:32", 256 * 3)
    kept[::2] = False
    kept[::4, 1] = True
    assert detect(kept).pattern == "1:32"
    empty = torch.zeros(8, 96, dtype=torch.bool)
    assert detect(empty) == Detected("unstructured", 0)
    empty[3, 5] = True
    assert detect(empty) == Detected("unstructured", 1)


def test_dense_weights_say_why():
    full = torch.ones(16, 32, dtype=torch.bool)
    assert detect(full).pattern is None and "it has no zeros" in detect(full).reason
    full[0, :4] = False
    found = detect(full)
    assert found.pattern is None and found.reason.startswith("density 0.9922 is above 0.85") and found.nnz == 508
    assert detect(mask("7:8")).pattern is None  # 0.875 kept


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_groups_down_the_columns_are_noticed(pattern):
    kept = mask(pattern, 96, 256).T
    found = detect(kept)
    assert found.pattern == "unstructured" and found.transposed == pattern
    assert detect(kept[:-1]).transposed is None  # no whole groups of four rows
    assert detect(mask("unstructured")).transposed is None


def test_overrides_name_their_modules_and_no_other():
    names = [f"model.layers.{i}.{part}" for i in range(12) for part in ("mlp.up_proj", "mlp.down_proj", "attn.o_proj")]
    patterns = dict.fromkeys(names, "2:4") | {"lm_head": "unstructured"}
    patterns |= {name: "unstructured" for name in names if "down_proj" in name}
    patterns |= {"model.layers.1.attn.o_proj": "4:8", "model.layers.11.attn.o_proj": "4:8"}
    overrides = compact_overrides({name: pattern for name, pattern in patterns.items() if pattern != "2:4"})
    assert len(overrides) <= 3
    for order in (1, -1):  # in whichever order a file holds them
        config = SparseConfig(pattern="2:4", overrides=dict(list(overrides.items())[::order]))
        assert {name: config.pattern_for(name) for name in patterns} == patterns
        assert config.pattern_for("language_model.lm_head") == "unstructured"
        assert config.pattern_for("model.layers.12.mlp.down_proj") == "2:4"
