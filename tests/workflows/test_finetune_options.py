"""Flat names find their place: ours, the adapter's, the Trainer's; and later sources win."""

import pytest

from sparse_rt.errors import UserError
from sparse_rt.workflows.finetune_options import finetune_options, parse_flags

GIVEN = {"model": "m", "output_dir": "out"}


def test_names_are_sorted_and_flags_win_over_set_over_yaml(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("adapter: masklora\nr: 4\nlearning_rate: 1e-3\nmax_steps: 5\nmax_seq_len: 64\ndataset: a.jsonl\n")
    options = finetune_options(
        {**GIVEN, "max_seq_len": 32}, run, ["max_steps=7", "learning_rate=2e-3"], ["--max-steps", "9", "--bf16"]
    )
    assert (options.adapter, options.max_seq_len, options.dataset) == ("masklora", 32, "a.jsonl")
    assert options.adapter_options == {"r": 4}
    assert options.trainer == {"learning_rate": 2e-3, "max_steps": 9, "bf16": True}


def test_the_run_file_that_finetune_writes_can_be_given_back(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("model: old\nadapter: spp\nadapter_options: {groups: 8}\ntrainer: {max_steps: 3}\n")
    options = finetune_options(GIVEN, run, ["groups=4"])
    assert options.model == "m" and options.adapter_options == {"groups": 4} and options.trainer == {"max_steps": 3}


def test_a_second_task_of_dcft_as_flags():
    extra = ["--units", "qk,vo", "--rope-tied", "--similarity", "10", "--max-steps", "5"]
    options = finetune_options({**GIVEN, "adapter": "dcft", "previous": "task1"}, extra=extra)
    assert options.previous == "task1" and options.trainer == {"max_steps": 5}
    assert options.adapter_options == {"units": "qk,vo", "rope_tied": True, "similarity": 10}


def test_flags_are_read_as_yaml_reads_them():
    parsed = parse_flags(["--learning-rate=1e-3", "--report-to", "none", "--fp16", "--warmup-steps", "3"])
    assert parsed == {"learning_rate": 1e-3, "report_to": "none", "fp16": True, "warmup_steps": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(given=GIVEN, extra=["loose"]), "unexpected argument 'loose'"),
        (dict(given=GIVEN, assignments=["nothing"]), "write KEY=VALUE"),
        (dict(given=GIVEN, config="missing.yaml"), "cannot read missing.yaml"),
        (dict(given={**GIVEN, "adapter": "magic"}), "known are .*spp"),
        (dict(given={**GIVEN, "max_seq_len": 1}), "option max_seq_len"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message):
        finetune_options(**arguments)


def test_an_unquoted_pattern_in_yaml_is_refused_with_the_remedy(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("pattern: 2:4\n")
    with pytest.raises(UserError, match="in quotes"):
        finetune_options(GIVEN, run)
