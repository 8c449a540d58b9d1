"""`convert --ratios owl`: blocks with more outliers keep more, the model as a whole keeps what was asked for."""

import json
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import helpers
from sparse_rt import assets
from sparse_rt.checkpoint import Checkpoint, file_digest, partial_path
from sparse_rt.config import ConvertOptions, VerifyOptions
from sparse_rt.conversion import timing
from sparse_rt.data import read_texts, token_windows
from sparse_rt.errors import UserError
from sparse_rt.formats.base import num_kept
from sparse_rt.hf.load import load, load_tokenizer
from sparse_rt.pruning import find_blocks
from sparse_rt.workflows.convert import convert
from sparse_rt.workflows.verify import verify

BLOCKS = 4


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model whose blocks have outliers in different numbers (weights made loud in 0, 1, 4 and 9 columns)."""
    folder = tmp_path_factory.mktemp("ratios")
    model = helpers.tiny_llama(folder / "model", num_hidden_layers=BLOCKS)
    tensors = load_file(model / "model.safetensors")
    for block, loud in enumerate((1, 0, 9, 4)):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            tensors[f"model.layers.{block}.{name}.weight"][:, :loud] *= 20
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (folder / "text.txt").write_text(assets.calibration_text().read_text()[:6000])
    return folder


def options(setting, output, **more):
    fields = dict(dataset=str(setting / "text.txt"), num_samples=3, max_seq_len=24, ratios="owl", max_shard_size="60kB")
    return ConvertOptions.build(model=str(setting / "model"), output_dir=output, **{**fields, **more})


@torch.no_grad()
def outliers(setting, threshold):
    """D of every block in float64, with the whole model in memory."""
    model = AutoModelForCausalLM.from_pretrained(setting / "model", dtype="auto").eval()
    tokenizer = load_tokenizer(setting / "model")
    squares, hooks = {}, []
    _, blocks = find_blocks(model)
    for block in blocks:
        for linear in (m for m in block.modules() if isinstance(m, torch.nn.Linear)):

            def add(module, args):
                squares[module] = squares.get(module, 0) + args[0].double().square().flatten(0, -2).sum(0)

            hooks.append(linear.register_forward_pre_hook(add))
    for sequence in token_windows(read_texts(setting / "text.txt"), tokenizer, 24, 3, 0):
        model(sequence.unsqueeze(0), use_cache=False)
    found = []
    for block in blocks:
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        scores = torch.cat([(m.weight.double().abs() * squares[m].sqrt()).flatten() for m in linears])
        found.append(100 * float((scores > threshold * scores.mean()).double().mean()))
    return found


def kept_by_block(folder):
    """(kept, all) weights of every block, from the written headers."""
    found = {}
    for name, entry in Checkpoint.open(folder).weights.items():
        block = int(re.search(r"layers\.(\d+)", name)[1])
        kept, size = found.get(block, (0, 0))
        found[block] = (kept + entry.nnz, size + entry.m * entry.n)
    return [found[block] for block in range(BLOCKS)]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_unstructured_ratios_are_the_papers(setting, tmp_path, method):
    more = {"method": method, "pattern": "unstructured", "sparsity": 0.7}
    result = convert(options(setting, tmp_path / "owl", **more))
    found = outliers(setting, 5)
    share = [(d - min(found)) / (max(found) - min(found)) * 0.16 for d in found]
    density = [s + 0.3 - sum(share) / BLOCKS for s in share]  # equal blocks: a plain mean
    # Wanda keeps whole numbers of every row: at most 1 of 64 columns away from the ratio.
    tolerance = 1 / 64 if method == "wanda" else 1e-3
    kept = kept_by_block(tmp_path / "owl")
    for block, (count, size) in enumerate(kept):
        assert count / size == pytest.approx(density[block], abs=tolerance), block
        facts = result["ratios"]["blocks"][f"model.layers.{block}"]
        assert facts["sparsity"] == pytest.approx(1 - count / size, abs=1e-6)
        assert facts["outliers_percent"] == pytest.approx(found[block], abs=0.05)
    assert sorted(range(BLOCKS), key=lambda b: kept[b][0]) == sorted(range(BLOCKS), key=found.__getitem__)
    rows = 160 if method == "wanda" else 1  # that the largest matrix keeps or drops together
    assert abs(sum(count for count, _ in kept) - num_kept(sum(size for _, size in kept), 0.7)) <= rows / 2
    assert verify(VerifyOptions.build(model=str(tmp_path / "owl")))["ok"]


def test_blocks_of_nm_get_an_n_of_their_own(setting, tmp_path):
    more = {"method": "wanda", "pattern": "4:8", "overrides": {"k_proj": "2:4", "up_proj": "unstructured"}}
    result = convert(options(setting, tmp_path / "out", **more))
    checkpoint = Checkpoint.open(tmp_path / "out")
    patterns = [{e.pattern for n, e in checkpoint.weights.items() if f"layers.{b}." in n} for b in range(BLOCKS)]
    own = [patterns[b] - {"2:4", "unstructured"} for b in range(BLOCKS)]
    assert all(len(found) == 1 and patterns[b] - own[b] == {"2:4", "unstructured"} for b, found in enumerate(own))
    kept = [int(found.pop().split(":")[0]) for found in own]
    assert sum(kept) == 4 * BLOCKS and len(set(kept)) > 1 and max(kept) - min(kept) <= 2
    found = outliers(setting, 6)
    assert kept[found.index(max(found))] == max(kept) and kept[found.index(min(found))] == min(kept)
    assert [result["ratios"]["blocks"][f"model.layers.{b}"]["sparsity"] for b in range(BLOCKS)] == [
        1 - n / 8 for n in kept
    ]
    # config.json says the same of every weight, in few words, whatever order its overrides are read in
    quantization = checkpoint.quantization
    assert len(quantization.overrides) <= 2 + len(set(kept))
    for name, entry in checkpoint.weights.items():
        assert quantization.pattern_for(name) == entry.pattern
    assert verify(VerifyOptions.build(model=str(tmp_path / "out")))["ok"]
    assert torch.isfinite(load(tmp_path / "out")(torch.ones(1, 4, dtype=torch.long)).logits).all()


def test_ratios_are_in_manifest_card_and_result(setting, tmp_path):
    more = {"pattern": "unstructured", "owl_lambda": 0.1, "owl_threshold": 3, "method": "wanda"}
    result = convert(options(setting, tmp_path / "out", **more))
    manifest = json.loads((tmp_path / "out" / "sparse_rt.manifest.json").read_text())
    assert manifest["ratios"] == result["ratios"]
    assert {k: manifest["options"][k] for k in ("ratios", "owl_lambda", "owl_threshold")} == {
        "ratios": "owl",
        "owl_lambda": 0.1,
        "owl_threshold": 3,
    }
    blocks = [facts["sparsity"] for facts in result["ratios"]["blocks"].values()]
    assert max(blocks) - min(blocks) == pytest.approx(0.2, abs=2 / 64)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"OWL (lambda 0.1, threshold 3): sparsity of the blocks {min(blocks):.4f} to {max(blocks):.4f}" in card
    assert not list((tmp_path / "out").glob(".*"))
    planned = convert(options(setting, tmp_path / "dry", dry_run=True, **more))
    assert any("--ratios owl first runs every block once" in note for note in planned["notes"])


def test_the_estimate_of_time_has_the_pass_that_counts_outliers(setting, tmp_path, monkeypatch):
    """A sequence takes a second a block, statistics a quarter, counting two: what is said, and what must be."""
    monkeypatch.setattr(timing, "_running", lambda *given: 1.0)
    monkeypatch.setattr(timing, "_collecting", lambda *given, **more: 0.25)
    monkeypatch.setattr(timing, "_counting", lambda *given: 2.0)
    found = {}
    for ratios in ("uniform", "owl"):
        chosen = options(setting, tmp_path / "out", method="wanda", dry_run=True, ratios=ratios)
        found[ratios] = convert(chosen)["estimated_seconds"]["forward"]
    uniform = 3 * (2 * BLOCKS - 1 + BLOCKS * 0.25)
    assert found == {"uniform": uniform, "owl": uniform + 3 * (BLOCKS + BLOCKS * 0.25) + 2}


def test_blocks_without_a_difference_are_reported(setting, tmp_path):
    result = convert(options(setting, tmp_path / "out", method="wanda", owl_lambda=0.01))
    assert any(note.startswith("--ratios owl came out uniform") for note in result["notes"])
    assert {entry.pattern for entry in Checkpoint.open(tmp_path / "out").weights.values()} == {"2:4"}


def test_what_cannot_work_is_refused_before_any_work(setting, tmp_path):
    for more, words in (
        ({"method": "none"}, "--method none prunes nothing; leave it out"),
        ({"ratios": "uniform", "owl_lambda": 0.1}, "--owl-lambda is an option of --ratios owl"),
        ({"ratios": "best"}, "option ratios: Input should be 'uniform' or 'owl'"),
        ({"pattern": "unstructured", "sparsity": 0.9}, "at most 0.05 is possible"),
        ({"pattern": "1:4"}, "no room for any"),
        ({"overrides": {"re:.*": "4:8"}}, "finds no weight in the decoder blocks without a pattern of its own"),
    ):
        with pytest.raises(UserError, match=words):
            convert(options(setting, tmp_path / "out", **more))
    assert list(tmp_path.iterdir()) == []


SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    from sparse_rt.config import ConvertOptions
    from sparse_rt.progress import Progress
    from sparse_rt.workflows.convert import convert

    class Kill(Progress):
        def __init__(self, phase):
            self.phase = phase

        def track(self, items, description, total=None):
            for number, item in enumerate(items):
                if number == 3 and description.startswith(self.phase):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item

    children = []
    for job in sys.argv[1:]:
        options, phase = job.split("|")
        child = os.fork()
        if child == 0:
            convert(ConvertOptions.model_validate_json(options), Kill(phase))
            os._exit(0)
        children.append(child)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    """
)
# What is converted, and in which part of the work the process dies.
KILLED = {
    "outliers": {"method": "wanda", "pattern": "unstructured", "sparsity": 0.6},
    "magnitude": {"method": "magnitude", "pattern": "4:8"},
}


def test_killed_and_resumed_equals_uninterrupted(setting, tmp_path):
    jobs = [
        f"{options(setting, tmp_path / phase, **more).model_dump_json(exclude_unset=True)}|{phase}"
        for phase, more in KILLED.items()
    ]
    run = subprocess.run([sys.executable, "-c", SCRIPT, *jobs], capture_output=True, text=True, timeout=300)
    assert run.stdout.split("\n")[-2] == str([-signal.SIGKILL] * 2), run.stderr
    assert list(partial_path(tmp_path / "magnitude").glob("part-*.safetensors"))
    with pytest.raises(UserError, match="cannot resume: .* with other options"):
        convert(options(setting, tmp_path / "magnitude", resume=True, owl_threshold=4, **KILLED["magnitude"]))
    for phase, more in KILLED.items():
        resumed = convert(options(setting, tmp_path / phase, resume=True, **more))
        straight = convert(options(setting, tmp_path / f"{phase}-straight", **more))
        assert resumed["ratios"] == straight["ratios"]
        digests = [{f.name: file_digest(f) for f in (tmp_path / (phase + end)).iterdir()} for end in ("", "-straight")]
        assert digests[0] == digests[1] and not partial_path(tmp_path / phase).exists()
