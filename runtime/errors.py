"""Errors a user meets. Each message is one sentence: what was given, what is allowed, what to do.

The command line turns them into exit codes: 1 the run failed, 2 bad usage / configuration / input file,
3 finished but a check failed.
"""


class SparseRTError(Exception):
    """Base class of every error raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UserError(SparseRTError, ValueError):
    """An argument, option or configuration that cannot work."""

    exit_code = 2


class FormatError(UserError):
    """A file that contradicts the sparse-rt format; names the file or tensor and the difference."""


class BackendError(SparseRTError, RuntimeError):
    """No backend can run an operation; lists every refusal."""


class CheckFailed(SparseRTError):
    """The work finished, but a check on its result did not hold; ``result`` is what there is to report."""

    exit_code = 3

    def __init__(self, message: str, result: dict | None = None):
        super().__init__(message)
        self.result = result
