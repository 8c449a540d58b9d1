"""What processes do, from /proc: their processor time and their memory. Linux; elsewhere nothing is known."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

# A process that used less than this share of a core over LOOK_SECONDS is idle.
IDLE_SHARE = 0.05
LOOK_SECONDS = 0.2
STATE, SESSION, USER_TIME, SYSTEM_TIME = 0, 3, 11, 12  # fields of /proc/PID/stat, counted after the command


def status_bytes(name: str, process: int | str = "self") -> int | None:
    """A size of /proc/PID/status.

    "VmRSS": bytes in memory, mapped files included; "VmHWM": the most of it; "RssAnon": without the mapped files, which
    the system can drop and read again.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def reset_peak() -> None:
    """Let this process's "VmHWM" begin anew."""
    with contextlib.suppress(OSError):  # the peak then includes the imports, which are the same on both sides
        Path("/proc/self/clear_refs").write_text("5")


def session_members(session: int) -> list[int]:
    """The processes of a session: one started with ``start_new_session`` and what it started."""
    return [pid for pid, fields in _processes() if int(fields[SESSION]) == session]


def largest_process(session: int) -> int | None:
    """The member of a session with the most memory: of an engine, the one that holds the weights."""
    return max(session_members(session), key=lambda pid: status_bytes("VmRSS", pid) or 0, default=None)


def processor_seconds(session: int) -> float:
    """User and system time that the living members of a session have used."""
    ticks = sum(
        int(fields[USER_TIME]) + int(fields[SYSTEM_TIME])
        for _, fields in _processes()
        if int(fields[SESSION]) == session
    )
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_until_idle(session: int, longest: float = 10.0) -> bool:
    """Wait until a session neither uses a processor nor waits for one; False when it still does after ``longest`` s."""
    end = time.monotonic() + longest
    while time.monotonic() < end:
        before = processor_seconds(session)
        time.sleep(LOOK_SECONDS)
        used = processor_seconds(session) - before
        if used <= IDLE_SHARE * LOOK_SECONDS and not _wants_to_run(session):
            return True
    return False


def _wants_to_run(session: int) -> bool:
    """A busy process that the others leave no time is not idle."""
    return any(fields[STATE] == "R" for _, fields in _processes() if int(fields[SESSION]) == session)


def _processes() -> list[tuple[int, list[str]]]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it ended since the listing
            continue
        found.append((int(path.parent.name), text.rpartition(")")[2].split()))
    return found
