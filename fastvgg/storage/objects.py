"""Objects of a store that fsspec knows (s3://, gs://, memory://): each is there whole, or not.

A call that fails is given again as fsspec's file system for that store does; what is raised in the
end is an OSError here.
"""

from __future__ import annotations

import errno
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from fastvgg.errors import StoppedError
from fastvgg.storage.local import Storage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

__all__ = [
    "StoreStorage",
    "exists",
    "listing",
    "opened",
    "os_errors",
    "put",
    "read",
    "read_all",
    "remove",
]

# What the packages of common stores raise beside OSError; each is looked for where it is loaded.
RAISED: Final = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)
# What tells that an object was changed, by the names that stores have for it.
CHANGED: Final = ("ETag", "etag", "md5", "LastModified", "last_modified", "mtime", "created")


@contextmanager
def os_errors() -> Iterator[None]:
    """Raise as an OSError what a store fails with."""
    raised = [
        getattr(sys.modules[module], name) for module, name in RAISED if module in sys.modules
    ]
    try:
        yield
    except tuple(raised) as error:
        if isinstance(error, OSError):
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def exists(path: Path) -> bool:
    """Whether there is an object of a name, or one below it."""
    with os_errors():
        return bool(_fresh(path).exists(_name(path)))


def opened(path: Path) -> BinaryIO:
    """Open an object, to read parts of it."""
    with os_errors():
        file: BinaryIO = _fresh(path).open(_name(path), "rb")
    return file


def read(path: Path) -> bytes | None:
    """Return what an object holds; None if it is missing."""
    try:
        with os_errors():
            content: bytes = _fresh(path).cat_file(_name(path))
    except FileNotFoundError:
        return None
    return content


def read_all(path: Path) -> dict[str, bytes]:
    """Return what all objects below a name hold, by the rest of theirs; many are read at once."""
    names = [f"{_name(path)}/{key}" for key in listing(path)]
    if not names:
        return {}
    with os_errors():
        # One that went since it was listed is left out.
        found = _fresh(path).cat(names, on_error="omit")
    return {name.rpartition(_name(path) + "/")[2]: content for name, content in found.items()}


def listing(path: Path) -> dict[str, tuple[int, str]]:
    """Return the size, and what changes with its content, of every object below a name."""
    name = _name(path)
    with os_errors():
        found = _fresh(path).find(name, detail=True)
    return {
        key.rpartition(name + "/")[2]: (int(status["size"]), _changed(status))
        for key, status in found.items()
        if key != name
    }


def put(path: Path, data: bytes | bytearray) -> None:
    """Write an object, at once."""
    with os_errors():
        _fresh(path).pipe_file(_name(path), data)


def remove(path: Path) -> None:
    """Remove an object, and all below it; missing is fine."""
    try:
        with os_errors():
            if _fresh(path).exists(_name(path)):
                _fresh(path).rm(_name(path), recursive=True)
    except FileNotFoundError:  # another removed it at the same time
        return


def _fresh(path: Path) -> Any:  # noqa: ANN401  # fsspec has no types
    """Return the file system of a path, which is to remember nothing of what it saw."""
    file_system = path.fs  # type: ignore[attr-defined]  # of universal_pathlib
    file_system.invalidate_cache()
    return file_system


def _name(path: Path) -> str:
    name: str = path.path  # type: ignore[attr-defined]
    return name.rstrip("/")  # a bucket's has one


def _changed(status: dict[str, Any]) -> str:
    return " ".join(str(status[name]) for name in CHANGED if name in status)


class StoreStorage(Storage):
    """The calls that change a store.

    Every method raises `StoppedError` where the store refuses.
    """

    def put(self, path: Path, data: bytes | bytearray) -> None:
        """Write an object, at once."""
        try:
            put(path, data)
        except OSError as error:
            raise StoppedError.from_os_error(error, "put", str(path), 0) from error

    def remove(self, path: Path) -> None:
        """Remove an object and all below it; missing is fine."""
        try:
            remove(path)
        except OSError as error:
            raise StoppedError.from_os_error(error, "remove", str(path), 0) from error

    def write_atomic(self, path: Path, pieces: Iterable[bytes]) -> None:
        """Write an object of pieces."""
        self.put(path, b"".join(pieces))

    def sync_directory(self, path: Path) -> None:
        """Do nothing: what is put is durable."""

    def syncfs(self, directory: Path) -> None:
        """Do nothing: what is put is durable."""
