"""The native kernels are compiled at first use, once for all processes; every failure is a sentence with a remedy."""

import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from helpers import compressed
from sparse_rt.kernels import backends, ops
from sparse_rt.kernels.native import build, library


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder; what the process had loaded before is loaded again afterwards."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(build.CACHE_VARIABLE, str(folder))
    forget()
    yield folder / "native"
    monkeypatch.undo()
    forget()


def forget():
    library.forget()
    backends.select.cache_clear()


def script(path, body):
    """A compiler of our own: answers --version, otherwise runs ``body`` (OUT is the -o argument)."""
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--version*) echo "test compiler 1.0"; exit 0;; esac\n'
        'for word in "$@"; do [ "$last" = -o ] && OUT="$word"; last="$word"; done\n' + textwrap.dedent(body)
    )
    path.chmod(0o755)
    return str(path)


def python(code, **environment):
    """Run ``code`` in a fresh process and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_compile_once_and_both_get_the_library(cache, tmp_path):
    compiler = script(tmp_path / "slow", f'echo compiled >> {tmp_path}/log\nsleep 0.5\necho done > "$OUT"\n')
    code = "from sparse_rt.kernels.native.build import build; print(build())"
    both = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "CC": compiler}, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=120)[0].decode().strip() for process in both}
    assert len(paths) == 1 and os.path.dirname(paths.pop()) == str(cache)
    assert (tmp_path / "log").read_text() == "compiled\n"
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".so"]


def test_half_a_file_is_never_left_behind(cache, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "CC", script(tmp_path / "dies", 'echo half > "$OUT"\necho "fatal error: disk full" >&2\nexit 1\n')
    )
    with pytest.raises(build.BuildError, match=r"cannot compile the kernels \(fatal error: disk full\).*set CC"):
        build.build()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_broken_compiler_is_reported_once_and_the_reference_runs(cache, monkeypatch, caplog):
    monkeypatch.setenv("CC", "/bin/false")
    values, metadata, dense = compressed(8, 16, "2:4")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(ops.decompress(values, metadata, "2:4", 8, 16), dense)
            backends.select.cache_clear()
    warnings = [record.getMessage() for record in caplog.records if "native" in record.name]
    assert len(warnings) == 1
    assert "/bin/false --version failed" in warnings[0] and "set CC" in warnings[0] and "reference" in warnings[0]
    choice = backends.explain(backends.Call("linear", "2:4", 8, 16, 1, torch.float32, "cpu"))
    assert choice.backend.name == "reference"
    assert dict(choice.refused)["native"] == library.unavailable_reason()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CC", "no-such-compiler", r"no C compiler was found \(CC=no-such-compiler\); install one .* or set CC"),
        ("PATH", "", r"no C compiler was found \(cc, gcc and clang\)"),
        (
            build.CACHE_VARIABLE,
            "{file}/cache",
            r"the cache folder .*/file/cache/native cannot be used .*set SPARSE_RT_CACHE",
        ),
    ],
)
def test_the_reason_names_the_cause_and_the_remedy(cache, tmp_path, monkeypatch, variable, value, reason):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv(variable, value.format(file=tmp_path / "file"))
    assert re.search(reason, library.unavailable_reason() or "")


def test_an_unknown_instruction_set_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, "mmx")
    library.forget()
    known = "scalar, avx2, avx512, avx512_bf16"
    assert library.unavailable_reason() == f"SPARSE_RT_NATIVE_ISA=mmx: unknown; allowed are {known}"
    monkeypatch.undo()
    library.forget()
    assert library.unavailable_reason() is None


def test_a_compiler_that_hangs_is_given_up(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "COMPILE_SECONDS", 0.3)
    monkeypatch.setenv("CC", script(tmp_path / "hangs", "exec sleep 60\n"))
    with pytest.raises(build.BuildError, match=r"took longer than 0.3 s"):
        build.build()


def test_a_lock_that_is_never_released_does_not_block_for_ever(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "LOCK_SECONDS", 0.3)
    monkeypatch.setenv("CC", script(tmp_path / "quick", 'echo done > "$OUT"\n'))
    path = build.build()
    path.unlink()
    with path.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert build.build() == path and path.is_file()


def test_a_library_that_cannot_be_loaded_is_compiled_again(cache, tmp_path, monkeypatch):
    body = f'[ -e {tmp_path}/again ] && exec cc "$@"\ntouch {tmp_path}/again\necho "for another system" > "$OUT"\n'
    monkeypatch.setenv("CC", script(tmp_path / "first wrong", body).replace(" ", "\\ "))
    path = build.build()
    assert path.read_text() == "for another system\n"
    assert library.unavailable_reason() is None
    assert library.load().path == path and path.read_bytes().startswith(b"\x7fELF")


def test_code_that_others_could_have_put_there_is_not_loaded(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path / "quick", 'echo done > "$OUT"\n'))
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(build.BuildError, match="everyone can write to; set SPARSE_RT_CACHE_DIR"):
        build.build()


def test_the_key_follows_sources_compiler_and_flags(tmp_path):
    source = tmp_path / "a.c"
    source.write_text("int a;")
    keys = [build.cache_key([source], compiler, flags) for compiler in ("cc 1", "cc 2") for flags in (["-O2"], ["-O3"])]
    source.write_text("int b;")
    keys.append(build.cache_key([source], "cc 1", ["-O2"]))
    assert len(set(keys)) == 5
    assert build.cache_key([source], "cc 1", ["-O2"]) == keys[-1]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(build.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / "sparse-rt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / ".cache/sparse-rt"
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "own"))
    assert build.cache_dir() == tmp_path / "own"


def test_one_openmp_runtime_nothing_compiled_at_import_and_a_forked_child_that_works(tmp_path):
    """In a fresh process: import, decompress on two threads, fork, decompress in the child."""
    report = python(
        """
        import json, os, signal, torch
        from pathlib import Path
        from sparse_rt.kernels import backends, ops
        backends.load_backends()
        cache = Path(os.environ["SPARSE_RT_CACHE_DIR"])
        report = {"compiled at import": cache.exists()}
        torch.set_num_threads(2)
        bitmask, values = torch.full((512, 64), 15, dtype=torch.uint8), torch.randn(512 * 64 * 4)
        expected = ops.decompress(values, bitmask, "unstructured", 512, 512).numpy().tobytes()
        from sparse_rt.kernels.native import build, library
        report["reason"], report["threads"] = library.unavailable_reason(), library.load().has_threads
        report["runtimes"] = build.openmp_runtimes()
        report["isa"] = library.load().isa
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # not torch.equal: torch itself hangs on large tensors in a forked child
            same = ops.decompress(values, bitmask, "unstructured", 512, 512).numpy().tobytes() == expected
            os._exit(0 if same else 1)
        report["child"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps(report))
        """,
        SPARSE_RT_CACHE_DIR=str(tmp_path / "cache"),
        SPARSE_RT_NATIVE_ISA="scalar",
    )
    report = json.loads(report)
    assert report["reason"] is None and report["compiled at import"] is False
    assert report["threads"] and len(report["runtimes"]) == 1, report
    assert report["isa"] == "scalar"
    assert report["child"] == 0
