"""An interrupted conversion leaves no half model, and resumed it writes the bytes of an uninterrupted one."""

import subprocess
import sys
import textwrap

import pytest

import helpers
from sparse_rt import assets
from sparse_rt.checkpoint import file_digest, partial_path
from sparse_rt.config import ConvertOptions
from sparse_rt.errors import UserError
from sparse_rt.progress import Progress
from sparse_rt.workflows.convert import convert

# Options of a conversion, and after how many steps (tensors, or blocks when calibrated) the process dies.
CASES = {
    "magnitude": ({"method": "magnitude", "pattern": "unstructured"}, 14),
    "none": ({"method": "none", "pattern": "unstructured"}, 14),
    "sparsegpt": ({"method": "sparsegpt"}, 3),
    "offloaded": ({"method": "wanda", "offload_activations": True}, 2),
    "reconstruct": ({"method": "magnitude", "reconstruct": 3}, 3),
    # gate_proj is written dense, but with its rows in another order
    "permute": ({"method": "ria", "permute": True, "reconstruct": 3, "ignore": ["lm_head", "gate_proj"]}, 3),
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A four-block model (two weights of it half zero) and a short text."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("resume")
    model = helpers.tiny_llama(folder / "model", num_hidden_layers=4)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name and not name.endswith("layers.0.mlp.up_proj.weight"):  # the one weight that stays dense
            tensor[torch.rand(tensor.shape) < 0.6] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (folder / "text.txt").write_text(assets.calibration_text().read_text()[:6000])
    return folder


def options(setting, output, case, **more):
    fields = dict(
        model=str(setting / "model"),
        output_dir=output,
        dataset=str(setting / "text.txt"),
        num_samples=3,
        max_seq_len=24,
        max_shard_size="60kB",
    )
    return ConvertOptions.build(**{**fields, **CASES[case][0], **more})


def digests(folder):
    return {file.name: file_digest(file) for file in folder.iterdir()}


class Interrupt(Progress):
    """Raises in the middle of the work, as Ctrl-C does."""

    def __init__(self, error=None, after=10**9):
        self.error, self.after, self.steps, self.notes = error, after, 0, []

    def note(self, text):
        self.notes.append(text)

    def track(self, items, description, total=None):
        for item in items:
            self.steps += 1
            if self.steps > self.after:
                raise self.error
            yield item


SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    from sparse_rt.config import ConvertOptions
    from sparse_rt.progress import Progress
    from sparse_rt.workflows.convert import convert

    class Kill(Progress):
        def __init__(self, after):
            self.after = after

        def track(self, items, description, total=None):
            for number, item in enumerate(items):
                if number == self.after:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item

    jobs = [job.split("|") for job in sys.argv[1:]]
    children = []
    for options, after in jobs:
        child = os.fork()
        if child == 0:
            convert(ConvertOptions.model_validate_json(options), Kill(int(after)))
            os._exit(0)
        children.append(child)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    """
)


def test_killed_and_resumed_equals_uninterrupted(setting, tmp_path):
    jobs = []
    for case, (_, after) in CASES.items():
        chosen = options(setting, tmp_path / case, case)
        jobs.append(f"{chosen.model_dump_json(exclude_unset=True)}|{after}")
    run = subprocess.run([sys.executable, "-c", SCRIPT, *jobs], capture_output=True, text=True, timeout=300)
    assert run.stdout.split("\n")[-2] == str([-9] * len(CASES)), run.stderr
    for case in CASES:
        partial = partial_path(tmp_path / case)
        assert not (tmp_path / case).exists() and len(list(partial.glob("part-*.safetensors"))) >= 2
        assert {file.name.partition("-")[0] for file in partial.iterdir()} == {"part", ".facts.jsonl", "progress.json"}
        progress = Interrupt()
        resumed = convert(options(setting, tmp_path / case, case, resume=True), progress)
        assert any(note.startswith("resuming: ") for note in progress.notes)
        straight = convert(options(setting, tmp_path / f"{case}-straight", case))
        assert digests(tmp_path / case) == digests(tmp_path / f"{case}-straight")
        assert not partial.exists()
        if (
            "offload_activations" in CASES[case][0]
        ):  # where the activations were makes no difference, and leaves nothing
            convert(options(setting, tmp_path / f"{case}-memory", case, offload_activations=False))
            assert digests(tmp_path / case) == digests(tmp_path / f"{case}-memory")
        differing = {"seconds", "peak_memory_bytes", "output_dir"}
        assert {k: v for k, v in resumed.items() if k not in differing} == {
            k: v for k, v in straight.items() if k not in differing
        }


def test_ctrl_c_leaves_no_half_model_and_bad_input_leaves_nothing(setting, tmp_path):
    output = tmp_path / "out"
    progress = Interrupt(KeyboardInterrupt(), after=20)
    with pytest.raises(KeyboardInterrupt):
        convert(options(setting, output, "magnitude"), progress)
    assert not output.exists() and partial_path(output).is_dir() and "--resume goes on" in progress.notes[-1]
    with pytest.raises(UserError, match="cannot resume: the unfinished conversion was started .* with other options"):
        convert(options(setting, output, "magnitude", sparsity=0.7, resume=True))
    with pytest.raises(UserError, match="was interrupted; pass --resume to go on with it, or --overwrite"):
        convert(options(setting, output, "magnitude"))
    assert partial_path(output).is_dir()  # a refusal destroys nothing
    convert(options(setting, output, "magnitude", resume=True))
    convert(options(setting, tmp_path / "straight", "magnitude"))
    assert digests(output) == digests(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):  # before the first shard there is nothing worth keeping
        convert(options(setting, tmp_path / "early", "magnitude"), Interrupt(KeyboardInterrupt(), after=0))
    with pytest.raises(UserError):
        convert(options(setting, tmp_path / "bad", "magnitude"), Interrupt(UserError("a damaged tensor"), after=20))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "straight"]


def test_interrupted_while_finishing(setting, tmp_path, monkeypatch):
    """The shards have their final names already, index and manifest do not exist yet."""
    from sparse_rt.checkpoint import writer

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(writer.CheckpointWriter, "_manifest", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            convert(options(setting, output, "magnitude"))
    assert list(partial_path(output).glob("sparse_rt-*.safetensors"))
    convert(options(setting, output, "magnitude", resume=True))
    convert(options(setting, tmp_path / "straight", "magnitude"))
    assert digests(output) == digests(tmp_path / "straight")


def test_resume_refuses_a_source_whose_data_changed(setting, tmp_path):
    import os

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(options(setting, output, "magnitude"), Interrupt(KeyboardInterrupt(), after=20))
    os.utime(setting / "model" / "model.safetensors")
    with pytest.raises(UserError, match="cannot resume"):
        convert(options(setting, output, "magnitude", resume=True))


def test_resume_refuses_when_the_orders_of_a_permuted_block_are_lost(setting, tmp_path):
    output = tmp_path / "out"
    chosen = dict(reconstruct=0)
    with pytest.raises(KeyboardInterrupt):
        convert(options(setting, output, "permute", **chosen), Interrupt(KeyboardInterrupt(), after=3))
    facts = partial_path(output) / ".facts.jsonl"
    lines = facts.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "permutation of model.layers.0" not in line]
    assert len(kept) == len(lines) - 1
    facts.write_text("".join(kept))
    with pytest.raises(UserError, match="cannot resume: the notes of the unfinished conversion are damaged"):
        convert(options(setting, output, "permute", resume=True, **chosen))
