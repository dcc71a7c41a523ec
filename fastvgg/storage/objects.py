"""Objects in a store that fsspec supports (s3://, gs://, memory://). Writes are atomic.

fsspec's file system for the store retries failed calls. The final failure is raised as an OSError.
"""

from __future__ import annotations

import errno
import io
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from fastvgg.storage.local import io_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

# What the packages of common stores raise besides OSError. Only loaded modules are looked up.
STORE_ERRORS: Final = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)
# Metadata that changes with an object's content, under the names that stores use.
VERSION_FIELDS: Final = ("ETag", "etag", "md5", "LastModified", "last_modified", "mtime", "created")


@contextmanager
def os_errors() -> Iterator[None]:
    """Convert a store's exceptions to OSError."""
    errors = [
        getattr(sys.modules[module], name) for module, name in STORE_ERRORS if module in sys.modules
    ]
    try:
        yield
    except tuple(errors) as error:
        if isinstance(error, OSError):
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def exists(path: Path) -> bool:
    """Whether an object exists at a path or below it."""
    with os_errors():
        return bool(_get_file_system(path).exists(_key(path)))


def open_object(path: Path) -> BinaryIO:
    """Open an object for random-access reads."""
    with os_errors():
        file = _get_file_system(path).open(_key(path), "rb")
    return io.BufferedReader(file)  # of fsspec's own methods, some take no size


def read(path: Path) -> bytes | None:
    """Return the content of an object, or None if it does not exist."""
    try:
        with os_errors():
            content: bytes = _get_file_system(path).cat_file(_key(path))
    except FileNotFoundError:
        return None
    return content


def read_all(path: Path) -> dict[str, bytes]:
    """Read all objects below a path concurrently; return their contents by relative name."""
    names = [f"{_key(path)}/{key}" for key in list_objects(path)]
    if not names:
        return {}
    with os_errors():
        # Omits an object that was removed after the listing.
        contents = _get_file_system(path).cat(names, on_error="omit")
    return {name.rpartition(_key(path) + "/")[2]: content for name, content in contents.items()}


def list_objects(path: Path) -> dict[str, tuple[int, str]]:
    """Return the size and a version string of every object below a path, by relative name."""
    name = _key(path)
    with os_errors():
        objects = _get_file_system(path).find(name, detail=True)
    return {
        key.rpartition(name + "/")[2]: (
            int(status["size"]),
            " ".join(str(status[field]) for field in VERSION_FIELDS if field in status),
        )
        for key, status in objects.items()
        if key != name
    }


def put(path: Path, data: bytes | bytearray) -> None:
    """Write an object atomically."""
    with os_errors():
        _get_file_system(path).pipe_file(_key(path), data)


def remove(path: Path) -> None:
    """Remove an object and all below it; do nothing if there are none."""
    try:
        with os_errors():
            if _get_file_system(path).exists(_key(path)):
                _get_file_system(path).rm(_key(path), recursive=True)
    except FileNotFoundError:  # removed concurrently
        return


def _get_file_system(path: Path) -> Any:  # noqa: ANN401  # fsspec has no types
    """Return the file system of a path, with its listing cache invalidated."""
    file_system = path.fs  # type: ignore[attr-defined]  # a UPath
    file_system.invalidate_cache()
    return file_system


def _key(path: Path) -> str:
    name: str = path.path  # type: ignore[attr-defined]
    return name.rstrip("/")  # a bucket's name ends in one


class ObjectStorage:
    """The calls that modify a store. An object is durable once it is put.

    Every method raises `StoppedError` if the call fails.
    """

    def put(self, path: Path, data: bytes | bytearray) -> None:
        """Write an object atomically."""
        with io_errors("put", path):
            put(path, data)

    def remove(self, path: Path) -> None:
        """Remove an object and all below it; do nothing if there are none."""
        with io_errors("remove", path):
            remove(path)

    def write_atomic(self, path: Path, buffers: Iterable[bytes]) -> None:
        """Concatenate the buffers and write them as one object."""
        self.put(path, b"".join(buffers))
