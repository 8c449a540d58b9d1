"""Several processes share the calibration sequences and prune as one process does."""

import json
import sys
from pathlib import Path

import pytest
import torch

import helpers
from sparse_rt import assets
from sparse_rt.checkpoint import Checkpoint, partial_path
from sparse_rt.config import ConvertOptions
from sparse_rt.formats import get_format
from sparse_rt.workflows.convert import convert

METHODS = ("wanda", "sparsegpt", "wanda+dsnot")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(folder, what process 0 saw, what process 1 saw, a function that gives the options of a case)."""
    folder = tmp_path_factory.mktemp("ranks")
    models = {
        "llama": helpers.tiny_llama(folder / "llama", num_hidden_layers=3, dtype=torch.float32),
        "mixtral": helpers.tiny_model(folder / "mixtral", "mixtral", torch.float32),
    }
    (folder / "text.txt").write_text(assets.calibration_text().read_text()[:20_000])

    def options(name, model="llama", **more):
        common = dict(dataset=str(folder / "text.txt"), num_samples=5, max_seq_len=32, max_shard_size="100kB")
        return dict(model=str(models[model]), output_dir=str(folder / name), **common, **more)

    cases = {name: {"options": options(name, method=name)} for name in METHODS}
    cases |= {
        "offloaded": {"options": options("offloaded", method="wanda", offload_activations=True)},
        "experts": {"options": options("experts", "mixtral", method="wanda")},
        "magnitude": {"options": options("magnitude", method="magnitude")},
        "damaged": {
            "options": options("damaged", method="wanda"),
            "fail": "model.layers.1.mlp.down_proj.weight",
        },
        "alone": {"options": options("alone", method="wanda", reconstruct=2)},
    }
    (folder / "spec.json").write_text(json.dumps({"cases": cases, "out": str(folder)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = helpers.run_processes([*command, str(Path(__file__).with_name("convert_ranks.py")), f"{folder}/spec.json"])
    assert done.returncode == 0, done.stderr[-5000:]
    first, second = (json.loads((folder / f"ranks.{rank}.json").read_text()) for rank in range(2))
    return folder, first, second, options


@pytest.mark.parametrize("case", [*METHODS, "offloaded", "experts", "magnitude"])
def test_the_masks_are_those_of_one_process(launched, case, tmp_path):
    folder, first, second, options = launched
    model = "mixtral" if case == "experts" else "llama"
    given = options(case, model, method=case if case in (*METHODS, "magnitude") else "wanda")
    alone = convert(ConvertOptions.build(**given | {"output_dir": str(tmp_path / "alone")}))
    assert first[case][0] is True and second[case] == [False, None]
    if case != "magnitude":
        assert first[case][1] == pytest.approx(alone["mean_reconstruction_error"], rel=1e-3)
    one, two = Checkpoint.open(tmp_path / "alone"), Checkpoint.open(folder / case)
    assert one.weights.keys() == two.weights.keys() and set(one.tensors) == set(two.tensors)
    for name, entry in one.weights.items():
        fmt = get_format(entry.pattern)
        dense = [fmt.decompress(*opened.load_weight(name), entry.m, entry.n) for opened in (one, two)]
        same = ((dense[0] != 0) == (dense[1] != 0)).float().mean()  # sums in another order can turn a near tie
        assert same > 0.999, (name, same)
        torch.testing.assert_close(*[d * ((dense[0] != 0) & (dense[1] != 0)) for d in dense], rtol=1e-2, atol=1e-4)


def test_an_error_in_one_process_ends_all_as_bad_input(launched):
    folder, first, second, _ = launched
    assert second["damaged"] == ["UserError", "model.layers.1.mlp.down_proj.weight is damaged"]
    assert first["damaged"] == ["UserError", "process 1 of 2: model.layers.1.mlp.down_proj.weight is damaged"]
    assert not (folder / "damaged").exists() and not partial_path(folder / "damaged").exists()


def test_what_several_processes_cannot_share_is_refused(launched):
    folder, first, second, _ = launched
    assert first["alone"] == second["alone"]
    assert first["alone"][0] == "UserError" and "--reconstruct works in one process, and 2 were launched" in str(first)
    assert not (folder / "alone").exists()
