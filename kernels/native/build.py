"""Compile the C sources into the user's cache and hand out the path of the shared library.

The key of a cached library is a hash of the sources, the compiler and the flags. Processes that start together compile
once (file lock) and nobody ever sees half a file (temporary name, atomic rename).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

CACHE_VARIABLE = "SPARSE_RT_CACHE_DIR"
COMPILE_SECONDS = 120
# A second process waits for the compiler of the first, then compiles itself: the rename makes that safe.
LOCK_SECONDS = COMPILE_SECONDS + 30
# No -march: functions name their instruction set and are chosen at run time, so a cache on a shared disk serves all.
# -fexceptions: an exception of torch may pass through csrc/torch_op.c.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-fexceptions", "-Wall")
REMEDY = "install one that works (Debian, Ubuntu: apt install gcc) or set CC to it"


class BuildError(Exception):
    """Why there is no library: one sentence with the remedy."""


def cache_dir() -> Path:
    """``SPARSE_RT_CACHE_DIR``, else ``XDG_CACHE_HOME/sparse-rt``, else ``~/.cache/sparse-rt``."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "sparse-rt"


def build(rebuild: bool = False) -> Path:
    """Path of the compiled library, from the cache when it is there; ``BuildError`` when it cannot be made."""
    compiler = find_compiler()
    identity = compiler_identity(compiler)
    flags = [*FLAGS, *openmp_flags(identity)]
    with as_file(files("sparse_rt.kernels.native").joinpath("csrc")) as csrc:
        sources = sorted(csrc.glob("*.[ch]"))
        name = f"sparse_rt_native-{cache_key(sources, identity, flags)}"
        return cached("native", name, compiler, flags, [s for s in sources if s.suffix == ".c"], rebuild)


def cached(
    folder: str, name: str, compiler: list[str], flags: list[str], sources: list[Path], rebuild: bool = False
) -> Path:
    """``name``.so in ``folder`` of the cache, made from ``sources`` when it is not there; ``BuildError``."""
    target = cache_dir() / folder / f"{name}.so"
    try:
        if target.is_file() and not rebuild:
            return trusted(target)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(target.with_suffix(".lock")):
            if rebuild or not target.is_file():
                compile_library(compiler, flags, sources, target)
        return trusted(target)
    except OSError as error:
        raise BuildError(
            f"the cache folder {target.parent} cannot be used ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} to a folder that can"
        ) from error


def find_compiler() -> list[str]:
    """The command of the C compiler: ``CC`` when set (it may carry arguments), else cc, gcc or clang."""
    wanted = os.environ.get("CC")
    names = [shlex.split(wanted)] if wanted and wanted.strip() else [["cc"], ["gcc"], ["clang"]]
    for command in names:
        if shutil.which(command[0]):
            return command
    tried = f"CC={wanted}" if wanted else "cc, gcc and clang"
    raise BuildError(f"no C compiler was found ({tried}); {REMEDY}")


def compiler_identity(compiler: list[str]) -> str:
    """First line of ``cc --version``, which changes with every release of a compiler."""
    done = run_compiler([*compiler, "--version"])
    if done.returncode != 0 or not done.stdout.strip():
        raise BuildError(f"{shlex.join(compiler)} --version failed ({tail(done.stderr)}); {REMEDY}")
    return done.stdout.splitlines()[0]


def openmp_flags(identity: str) -> list[str]:
    """Threads through the OpenMP runtime that torch has loaded.

    GNU OpenMP is linked by its path, because some torch wheels ship it under a name of their own and a second copy in
    the process would start a second set of threads; ``--as-needed`` then drops the system's copy, which -fopenmp adds.
    clang's OpenMP is another runtime and would be such a second one: its build runs on one thread.
    """
    if "clang" in identity.lower():
        return []
    loaded = [path for path in openmp_runtimes() if Path(path).name.startswith("libgomp")]
    # Other wheels (scikit-learn) may have brought one of their own.
    loaded.sort(key=lambda path: "/torch/" not in path)
    return ["-fopenmp", "-Wl,--as-needed", *loaded[:1]]


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*", maps)))


def cache_key(sources: list[Path], identity: str, flags: list[str]) -> str:
    digest = hashlib.sha256("\0".join([identity, platform.machine(), *flags]).encode())
    for source in sources:
        digest.update(f"\0{source.name}\0".encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def trusted(library: Path) -> Path:
    """Refuse a library that another user could have put there: loading it runs its code."""
    status, folder = library.stat(), library.parent.stat()
    if status.st_uid not in (os.geteuid(), 0) or (folder.st_mode & 0o002 and not folder.st_mode & 0o1000):
        raise BuildError(
            f"{library} belongs to another user or lies in a folder that everyone can write to; "
            f"set {CACHE_VARIABLE} to a folder of your own"
        )
    return library


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; after LOCK_SECONDS, or where the disk has no locks, go on without it."""
    with path.open("w") as handle:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield


def compile_library(compiler: list[str], flags: list[str], sources: list[Path], target: Path) -> None:
    """Compile to a temporary name beside ``target`` and rename; a killed compiler leaves nothing that is loaded."""
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp")
    command = [*compiler, *flags, "-o", str(temporary), *map(str, sources), "-lpthread", "-lm"]
    try:
        done = run_compiler(command)
        if done.returncode != 0:
            raise BuildError(f"{shlex.join(compiler)} cannot compile the kernels ({tail(done.stderr)}); {REMEDY}")
        # Without the fsync a power cut can leave the name without the data, and loading that ends the process (SIGBUS).
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def run_compiler(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {COMPILE_SECONDS} s; {REMEDY}") from error
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror}); {REMEDY}") from error


def tail(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[0]
