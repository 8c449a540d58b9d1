"""Perplexity against a plain loop, greedy text against transformers, and lm-evaluation-harness by path."""

import math

import pytest
import torch

from sparse_rt.config import EvalOptions, GenerateOptions
from sparse_rt.errors import UserError
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.workflows.eval import eval as evaluate
from sparse_rt.workflows.generate import generate


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n" * 60)
    return path


def test_perplexity_equals_a_plain_loop_over_windows(sparse_llama, text):
    result = evaluate(EvalOptions(model=str(sparse_llama), dataset=str(text), max_seq_len=48))
    model, tokenizer = load(sparse_llama), load_tokenizer(sparse_llama)
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 48 * 48].view(-1, 48)
    losses = []
    with torch.no_grad():
        for window in windows:
            log_p = model(window[None]).logits[0, :-1].double().log_softmax(-1)
            losses.append(-log_p.gather(1, window[1:, None]).mean())
    assert result["windows"] == len(windows) and result["context_length"] == 48
    assert result["perplexity"] == pytest.approx(math.exp(torch.stack(losses).mean()), rel=2e-3)


def test_context_is_capped_by_the_model_and_said(sparse_llama, text):
    result = evaluate(EvalOptions(model=str(sparse_llama), dataset=str(text)))
    assert result["context_length"] == 256


def test_text_shorter_than_a_window_is_refused(sparse_llama, tmp_path):
    (tmp_path / "short.txt").write_text("x = 1\n")
    with pytest.raises(UserError, match="one window needs 64"):
        evaluate(EvalOptions(model=str(sparse_llama), dataset=str(tmp_path / "short.txt"), max_seq_len=64))


def test_generate_equals_transformers(sparse_llama):
    result = generate(GenerateOptions(model=str(sparse_llama), prompt="def add(a, b):", max_new_tokens=6))
    model, tokenizer = load(sparse_llama), load_tokenizer(sparse_llama)
    inputs = tokenizer("def add(a, b):", return_tensors="pt")
    expected = model.generate(inputs.input_ids, max_new_tokens=6, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert result["token_ids"] == expected.tolist()
    assert result["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_lm_eval_by_path_and_by_object_agree(sparse_llama):
    """`import sparse_rt` is all that lm-evaluation-harness needs to take a folder."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    requests = [("def add(a, b):", " return a + b"), ("import", " os")]

    def score(**pretrained):
        wrapped = HFLM(**pretrained, device="cpu", batch_size=1, dtype="bfloat16")
        rows = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(requests)]
        return wrapped.loglikelihood(rows, disable_tqdm=True)

    by_path = score(pretrained=str(sparse_llama))
    by_object = score(pretrained=load(sparse_llama), tokenizer=load_tokenizer(sparse_llama))
    assert by_path == by_object and all(math.isfinite(value) for value, _ in by_path)


def test_lm_eval_tasks_run_on_a_local_task(sparse_llama, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    (tmp_path / "docs.jsonl").write_text('{"question": "x =", "choices": [" 1", " y"], "answer": 0}\n' * 4)
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'docs.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    import lm_eval

    original = lm_eval.simple_evaluate

    def with_local_tasks(**arguments):
        return original(**arguments, task_manager=TaskManager(include_path=str(tmp_path)))

    monkeypatch.setattr(lm_eval, "simple_evaluate", with_local_tasks)
    result = evaluate(EvalOptions(model=str(sparse_llama), tasks="tiny_choice", max_samples=3))
    assert 0 <= result["tasks"]["tiny_choice"]["acc,none"] <= 1
    with pytest.raises(UserError, match="no_such_task"):
        evaluate(EvalOptions(model=str(sparse_llama), tasks="no_such_task"))
