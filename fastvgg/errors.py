"""Typed errors: each says what is wrong, where, with which numbers, and what to do about it.

The class tells a program what happened and the command line how to exit::

    FastvggError                      exit 3: refused before anything was written
    ├── UsageError                    exit 2: the arguments contradict each other
    ├── ArrayError                    a batch in memory that the contract does not cover
    │   ├── ShapeError                wrong rank, or the channel axis is not 3
    │   ├── DtypeError                a type that the contract does not name
    │   └── OutputError               an `out` that cannot take the result
    ├── ModeError                     an unknown mode or model, or impossible constants
    ├── BackendError                  the backend asked for is not installed
    ├── SourceError                   a source that is missing, empty, damaged or of the wrong kind
    ├── TargetError                   a target that exists, cannot be written, or has no room
    ├── ResumeError                   an unfinished run that does not fit this command
    ├── VerificationError             exit 4: stored bytes are not what they should be
    └── StoppedError                  exit 5: an I/O error in the middle of a run; resumable
"""

from __future__ import annotations

import errno

__all__ = [
    "ArrayError",
    "BackendError",
    "DtypeError",
    "FastvggError",
    "ModeError",
    "OutputError",
    "ResumeError",
    "ShapeError",
    "SourceError",
    "StoppedError",
    "TargetError",
    "UsageError",
    "VerificationError",
]


class FastvggError(Exception):
    """Anything that fastvgg refuses or cannot finish.

    Parameters
    ----------
    problem
        What is wrong and where: the path, what was expected, what was found.
    remedy
        What to do about it: where there is one, the next command.

    Examples
    --------
    >>> error = FastvggError("photos/ holds no images", "give a directory with images in it")
    >>> print(error)
    photos/ holds no images
    give a directory with images in it
    """

    exit_code = 3

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n{self.remedy}"


class UsageError(FastvggError, ValueError):
    """The arguments contradict each other or name something unknown."""

    exit_code = 2


class ArrayError(FastvggError, ValueError):
    """A batch in memory that the contract does not cover; nothing was written."""


class ShapeError(ArrayError):
    """A batch of the wrong rank, or whose channel axis does not hold 3."""


class DtypeError(ArrayError, TypeError):
    """A type that the contract does not name."""


class OutputError(ArrayError):
    """An `out` that cannot take the result; it was not written."""


class ModeError(FastvggError, ValueError):
    """An unknown mode or model, or constants that no arithmetic can use."""

    exit_code = 2


class BackendError(FastvggError, RuntimeError):
    """The backend asked for is not installed."""


class SourceError(FastvggError):
    """A source that is missing, empty, damaged, or not of the kind asked for."""


class TargetError(FastvggError):
    """A target that exists, cannot be written, or has no room; it was not touched."""


class ResumeError(FastvggError):
    """An unfinished run that does not fit the command that was given."""


class ClusterError(FastvggError):
    """A cluster that does not answer, or whose workers could not do the work."""


class VerificationError(FastvggError):
    """Stored bytes are not what the manifest, or the oracle, says."""

    exit_code = 4


class StoppedError(FastvggError):
    """A run that an I/O error stopped; what was committed is kept, and the run resumes."""

    exit_code = 5

    @classmethod
    def from_os_error(cls, error: OSError, call: str, path: str, offset: int) -> StoppedError:
        """Name the call, the file and the offset of a failed system call."""
        code = errno.errorcode.get(error.errno or 0, "unknown error")
        return cls(
            f"{path}: {call} at offset {offset} failed: {error.strerror or error} ({code})",
            "mend the cause, then run the same command again: it resumes after the last "
            "committed chunk",
        )
