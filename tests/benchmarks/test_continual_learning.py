"""The continual-learning benchmark: texts for measuring are not trained on, and its cells are what it says."""

import continual_domains as domains
import continual_learning as benchmark
import continual_methods as methods
import continual_report as report
import pytest
import torch


def test_texts_are_split_by_file_and_copies_are_left_out():
    names = [f"file{i}" for i in range(60)]
    files = [(name, f"this line belongs to {name} alone\nand so does this one, of {name}\n") for name in names]
    measured = next(name for name in names if domains.split_of(name) == "test")
    trained = next(name for name in names if domains.split_of(name) == "train")
    text = dict(files)[trained]
    parts = domains.split([(name, text if name == measured else own) for name, own in files])
    assert all(parts[name] for name in domains.SPLITS)
    assert text in parts["train"] and text not in parts["test"]
    assert sum(len(part) for part in parts.values()) == 59


def test_replay_keeps_the_budget():
    rows = [torch.tensor([i]) for i in range(40)]
    seen = [torch.tensor([100 + i]) for i in range(40)]
    mixed = methods.with_replay(rows, seen, 0.05, seed=0)
    assert len(mixed) == 40 and sum(int(row) >= 100 for row in mixed) == 2
    assert methods.with_replay(rows, [], 0.05, seed=0) == rows == methods.with_replay(rows, seen, 0.0, seed=0)


def trials(name, best):
    method = methods.METHODS[name]
    return [
        {"kind": "tune", "method": name, method.tuned: trial, "validation_perplexity": abs(trial - best) + 10}
        for trial in method.trials
    ]


def test_settings_come_from_trials_of_the_method_and_of_its_sibling():
    rows = trials("dcft", 3e-2) + trials("dcft-frob", 10.0)
    assert benchmark.settings(rows, "dcft", None) == (3e-2, None)
    assert benchmark.settings(rows, "dcft-frob", None) == (3e-2, 10.0)
    assert benchmark.settings(rows, "dcft-cos", 1.0) == (3e-2, 1.0)
    assert benchmark.settings(rows, "dcft-cos", None)[0] is None, "its trials come first"
    assert benchmark.settings(rows[1:], "dcft", None)[0] is None
    assert benchmark.settings(rows, "dcft-switch", None) == (3e-2, None)
    assert {len(method.trials) for method in methods.METHODS.values()} == {0, 3}


def row(method, seed, table):
    found = {"kind": "run", "base": "2:4", "method": method, "seed": seed, "perplexities": table, "strength": None}
    metrics = vars(benchmark.perplexity_metrics(table)) if len(table) == 4 else {}
    return found | {"learning_rate": 0.01, "trainable_parameters": 7, **metrics}


def test_the_report_compares_forgetting(tmp_path):
    spp = [[40, 80, 80], [20, 80, 80], [22, 40, 80], [30, 50, 40]]
    dcft = [[40, 80, 80], [20, 80, 80], [20, 40, 80], [21, 41, 41]]
    rows = [row(name, seed, table) for name, table in (("spp", spp), ("dcft", dcft)) for seed in (0, 1)]
    rows.append(row("spp-joint", 0, [spp[0], [20, 40, 40]]))
    text = report.table(rows, "2:4")
    assert "| none | | | 0 | 63.50 | 80.00 |" in text and "| spp-joint |" in text
    assert report.bar(rows, "2:4")[0].endswith("+2.5 %: met")
    report.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_sequence_of_two_steps(tmp_path, monkeypatch):
    """Each kind of method trains; the table has a row before and one after each task, and the base is not changed."""
    windows = {d: {part: torch.randint(4096, (8, 32)) for part in domains.SPLITS} for d in domains.DOMAINS}
    monkeypatch.setattr(methods.domains, "windows", windows.__getitem__)
    monkeypatch.setattr(domains, "LENGTH", 32)
    folder = benchmark.pruned(tmp_path, "2:4")
    before = methods.before_training(folder, "test")
    for name in ("spp-replay", "spp-ewc", "dcft-taylor", "dcft-switch", "spp-joint"):
        method = methods.METHODS[name]
        found = methods.run(name, folder, 0, 2, 0.01, 1.0 if method.tuned == "strength" else None, tmp_path, before)
        table = found["perplexities"]
        assert table[0] == before and len(table) == (2 if method.joint else 4)
        assert table[-1] != before and found["trainable_parameters"] > 0
        if method.switch:
            assert table[1][0] == table[2][0] == table[3][0] != before[0] and table[1][1:] == before[1:]
    assert methods.before_training(folder, "test") == before
