"""A model's own samples: whole windows of one stream, drawn from its distribution, decided by the seed."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

import helpers
from sparse_rt import assets
from sparse_rt.data.selfgen import sample_windows


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(assets.model_dir(), dtype=torch.float32).eval()


@pytest.fixture
def tiny(tmp_path):
    """A model of 4096 tokens, with another first than last token."""
    folder = helpers.tiny_llama(tmp_path / "tiny", bos_token_id=7, eos_token_id=9)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_seed_decides_and_no_state_is_touched(model):
    state = torch.get_rng_state()
    first, again, other = (sample_windows(model, 20, 3, 1.0, seed) for seed in (1, 1, 2))
    assert first.shape == (3, 20) and first.dtype == torch.long
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_samples_are_likelier_the_colder_and_as_likely_as_the_entropy_says(model):
    """At temperature 1 the mean loss of samples is the mean entropy of the predictions."""

    def loss_and_entropy(temperature):
        windows = sample_windows(model, 48, 8, temperature, 0)
        logs = model(windows).logits[:, :-1].log_softmax(-1)
        loss = -logs.gather(-1, windows[:, 1:].unsqueeze(-1)).mean()
        return float(loss), float(-(logs.exp() * logs).sum(-1).mean())

    (cold, _), (loss, entropy) = (loss_and_entropy(temperature) for temperature in (0.4, 1.0))
    assert cold < 0.7 * loss and loss == pytest.approx(entropy, rel=0.12)


def test_every_text_starts_with_the_begin_token_and_ends_with_the_end_token(tiny):
    with torch.no_grad():
        tiny.lm_head.weight[9] = 0
        tiny.lm_head.weight[9] += 30 * tiny.lm_head.weight[11]  # the end token comes often
    stream = sample_windows(tiny, 40, 6, 1.0, 0).flatten().tolist()
    ends = [place for place, token in enumerate(stream[:-1]) if token == 9]
    assert stream[0] == 7 and len(ends) > 2
    assert all(stream[place + 1] == 7 for place in ends)
    starts = [0, *(place + 1 for place in ends)]
    assert all(stop - start >= 9 for start, stop in zip(starts, ends, strict=False))  # at least a quarter of 39


def test_one_token_that_begins_and_ends_is_not_doubled(model):
    assert model.config.bos_token_id == model.config.eos_token_id == 0
    stream = sample_windows(model, 96, 8, 1.5, 3).flatten().tolist()
    assert stream.count(0) > 1 and not any(a == b == 0 for a, b in pairwise(stream))


def test_without_a_begin_token_the_first_is_random_and_the_models_own_settings_are_not_used(tiny):
    tiny.config.bos_token_id = tiny.generation_config.bos_token_id = None
    tiny.generation_config.update(top_k=1, do_sample=False, repetition_penalty=3.0)
    windows = sample_windows(tiny, 8, 8, 1.0, 0)
    assert len(set(windows[:, 0].tolist())) > 4 and len(windows[:, 1:].unique()) > 40
