"""Typed exceptions. Each message states the problem, where it is, and the remedy.

The class identifies the error to a program and selects the exit code of the command line.
"""

from __future__ import annotations

import errno
import os
import shlex
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fastvgg.escaping import escape_controls

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_is_command_line = False


def is_command_line() -> bool:
    """Return whether messages are for a user of the command line."""
    return _is_command_line


def option(name: str, value: object = True) -> str:
    """Return an option with a value, as the caller writes it: in Python or on a command line.

    Every message that names an option uses this. What is stored, such as the reasons in an index,
    names no option, because it would depend on who ran it.

    Examples
    --------
    >>> option("size", (224, 224)), option("restart"), option("memory", "64MiB")
    ('size=(224, 224)', 'restart=True', "memory='64MiB'")
    >>> with command_line_vocabulary():
    ...     option("size", (224, 224)), option("restart"), option("fsync", False)
    ('--size 224 224', '--restart', '--no-fsync')
    """
    if not _is_command_line:
        return f"{name}={value!r}"
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([f"--{flag}", *map(_quote, values)])


def option_name(name: str) -> str:
    """Return the name of an option, for a message about any value of it.

    >>> option_name("out_layout")
    'out_layout='
    >>> with command_line_vocabulary():
    ...     option_name("out_layout")
    '--out-layout'
    """
    return f"--{name.replace('_', '-')}" if _is_command_line else f"{name}="


def argument(name: str) -> str:
    """Return the name of an argument: "source" is SRC on a command line, and "target" is DST.

    >>> argument("target")
    'target'
    >>> with command_line_vocabulary():
    ...     argument("target")
    'DST'
    """
    return {"source": "SRC", "target": "DST"}[name] if _is_command_line else name


def command(name: str, *arguments: object, **options: object) -> str:
    """Return a whole command, as the caller writes it: in Python or on a command line.

    >>> command("pack", "my photos", "packed.npy", size=(224, 224))
    "fastvgg.plan('my photos', 'packed.npy', direction='pack', size=(224, 224)).run()"
    >>> command("verify", "train.npy")
    "fastvgg.verify('train.npy')"
    >>> with command_line_vocabulary():
    ...     command("pack", "my photos", "packed.npy", size=(224, 224))
    "fastvgg pack 'my photos' packed.npy --size 224 224"
    """
    if _is_command_line:
        written = [option(*item) for item in options.items()]
        return " ".join(["fastvgg", name, *map(_quote, arguments), *written])
    if name == "models":
        return "fastvgg.models.MODES_BY_MODEL"
    values = [repr(str(argument)) for argument in arguments]
    is_plan = name in ("preprocess", "pack", "restore")
    if is_plan and name != "preprocess":
        values.append(option("direction", name))
    values += [option(*item) for item in options.items()]
    call = f"fastvgg.{'plan' if is_plan else name}({', '.join(values)})"
    return f"{call}.run()" if is_plan else call


def _quote(argument: object) -> str:
    return shlex.quote(str(argument))


@contextmanager
def command_line_vocabulary() -> Iterator[None]:
    """Have `option` write options as the command line does, in the whole process."""
    global _is_command_line  # who the caller is, for every thread of the process
    before, _is_command_line = _is_command_line, True
    try:
        yield
    finally:
        _is_command_line = before


REMEDIES: Final = {
    errno.EACCES: "check the permissions of the file and of its directory",
    errno.EPERM: "check the permissions and the attributes of the file and of its directory",
    errno.EROFS: "choose a file system that is not read-only",
    errno.ENOSPC: "free disk space, or choose another disk",
    errno.EDQUOT: "free space within your quota, or choose another disk",
    errno.EFBIG: "raise the limit on the size of files, ulimit -f, or choose a disk that has none",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "give the path that its symbolic link names",
    errno.EMFILE: "raise the limit on open files: ulimit -n",
    errno.ENFILE: "close other programs: the system has too many open files",
    errno.ENOENT: "create its directory, or correct the path",
    errno.ENOTDIR: "correct the path: a component of it is a file",
    errno.EBUSY: "choose another name: something is mounted there",
}


RERUN: Final = "fix the cause, and rerun the same command"


def remedy_for(error: OSError) -> str:
    """Return how to fix the cause of a failed system call."""
    return REMEDIES.get(error.errno or 0, RERUN)


def creation_remedy(directory: Path) -> str:
    """Return how to create a missing directory, which is impossible below a file.

    >>> from pathlib import Path
    >>> creation_remedy(Path("no such/directory"))
    "create it: mkdir -p 'no such/directory'"
    """
    above = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not above.is_dir():
        return f"{above} is a file: choose a directory that is not below it"
    return f"create it: {shlex.join(['mkdir', '-p', str(directory)])}"


def rank_remedy(shape: Sequence[int], name: str) -> str:
    """Return how to make a batch of images, of rank 4, of an array `name` of another rank.

    >>> rank_remedy((2, 5, 64, 64, 3), "x"), rank_remedy((64, 64, 3), "x")
    ('sequences of images: x.reshape(-1, 64, 64, 3)', 'a single image: x[numpy.newaxis]')
    >>> rank_remedy((8, 28, 28), "x")
    'grayscale images: numpy.stack([x] * 3, axis=-1)'
    >>> rank_remedy((8, 3072), "x"), rank_remedy((8,), "x")
    ('flat images: x.reshape(8, HEIGHT, WIDTH, 3)', 'labels, for example, are not images')
    """
    if len(shape) > 4:
        return f"sequences of images: {name}.reshape{(-1, *shape[-3:])}"
    if len(shape) == 3 and 3 in (shape[0], shape[-1]):
        return f"a single image: {name}[numpy.newaxis]"
    if len(shape) == 3:
        return f"grayscale images: numpy.stack([{name}] * 3, axis=-1)"
    if len(shape) == 2:
        return f"flat images: {name}.reshape({shape[0]}, HEIGHT, WIDTH, 3)"
    return "labels, for example, are not images"


def describe_os_error(error: OSError) -> str:
    """Return which file an error is about, if it says so, and its reason.

    >>> describe_os_error(OSError(errno.ENOSPC, "No space left on device", "x.npy"))
    'x.npy: No space left on device (ENOSPC)'
    """
    where = f"{error.filename}: " if error.filename else ""
    code = errno.errorcode.get(error.errno or 0)
    return f"{where}{error.strerror or error}{f' ({code})' if code else ''}"


class FastvggError(Exception):
    """Base class of all errors that fastvgg raises on purpose.

    Parameters
    ----------
    problem
        What is wrong and where: the path, what was expected and what was found.
    remedy
        How to fix it, with the next command where there is one.
    details
        What else is known, as JSON types.

    Examples
    --------
    >>> error = FastvggError("photos/ contains no images", "give a directory of images")
    >>> print(error)
    photos/ contains no images
    give a directory of images
    """

    exit_code = 3  # rejected before anything was written

    def __init__(self, problem: str, remedy: str, **details: Any) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy
        self.details = details

    def __str__(self) -> str:
        return f"{escape_controls(self.problem)}\n{escape_controls(self.remedy)}"


class UsageError(FastvggError, ValueError):
    """Invalid or conflicting arguments."""

    exit_code = 2


class ArrayError(FastvggError, ValueError):
    """An unsupported array in memory; nothing was written."""


class ShapeError(ArrayError):
    """A batch of the wrong rank, or with a channel axis whose length is not 3."""


class DtypeError(ArrayError, TypeError):
    """An unsupported dtype."""


class OutputError(ArrayError):
    """An `out` that cannot hold the result; it was not written."""


class ModeError(FastvggError, ValueError):
    """An unknown mode or model, or invalid constants."""

    exit_code = 2


class BackendError(FastvggError, RuntimeError):
    """The requested backend is not usable."""


class SourceError(FastvggError):
    """A source that is missing, empty, damaged, or of another format."""


class TargetError(FastvggError):
    """A target that exists, cannot be written, or does not fit on the disk; it is unchanged."""


class ResumeError(FastvggError):
    """An unfinished run that does not match the command."""


class ClusterError(FastvggError):
    """A cluster that does not respond, or whose workers failed."""


class DamagedChunk(NamedTuple):
    """Images of one chunk of a finished dataset that are not what was written."""

    chunk: int
    start: int
    """The first row."""
    stop: int
    """The row after the last one."""
    reason: str

    def __str__(self) -> str:
        is_single = self.stop == self.start + 1
        rows = f"image {self.start}" if is_single else f"images {self.start} to {self.stop - 1}"
        return f"{rows} ({self.reason})"


@contextmanager
def os_errors_refused(error_class: type[FastvggError] = SourceError) -> Iterator[None]:
    """Convert an OSError or StoppedError, raised before anything is written, to a refusal.

    Also a decorator.
    """
    try:
        yield
    except StoppedError as error:  # no run has begun that a rerun could resume
        raise error.as_refusal(error_class) from error
    except OSError as error:
        raise error_class(describe_os_error(error), remedy_for(error)) from error


class VerificationError(FastvggError):
    """Stored bytes that differ from the manifest or from the oracle.

    Parameters
    ----------
    problem, remedy
        As for `FastvggError`.
    damaged
        All chunks with wrong or unreadable images.
    differences
        What else differs: the header, the length, the index.
    """

    exit_code = 4

    def __init__(
        self,
        problem: str,
        remedy: str,
        *,
        damaged: Sequence[DamagedChunk] = (),
        differences: Sequence[str] = (),
    ) -> None:
        self.damaged = list(damaged)
        self.differences = list(differences)
        listed = [chunk._asdict() for chunk in self.damaged]
        super().__init__(problem, remedy, damaged=listed, differences=self.differences)


class StoppedError(FastvggError):
    """A run that an I/O error stopped; committed chunks are kept, and a rerun resumes."""

    exit_code = 5

    @classmethod
    def from_os_error(cls, error: OSError, call: str, path: str, offset: int) -> StoppedError:
        """Describe a failed system call by its name, file and offset."""
        code = errno.errorcode.get(error.errno or 0, "unknown error")
        return cls(
            f"{path}: {call} at offset {offset} failed: {error.strerror or error} ({code})",
            "fix the cause and rerun the same command: it resumes after the last committed chunk",
        )

    def as_refusal(self, error_class: type[FastvggError] = TargetError) -> FastvggError:
        """Return the error of a call that failed before anything was written."""
        cause = self.__cause__
        remedy = remedy_for(cause) if isinstance(cause, OSError) else RERUN
        return error_class(f"{self.problem}; nothing was written", remedy)
