"""Storage for one of several processes that write the same target."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

from fastvgg.storage.local import OpenFile, Storage

if TYPE_CHECKING:
    from pathlib import Path


class SharedStorage(Storage):
    """I/O in one directory, whose files other processes may be writing concurrently.

    The directory is held open, so that a new directory of the same name is never written to.
    Existing files are never truncated: data that another process wrote may be committed.
    """

    def __init__(self, directory: Path, *, fsync: bool = True) -> None:
        super().__init__(fsync=fsync)
        self.hold(directory)
        weakref.finalize(self, _close_all, self._held)

    def create(self, path: Path, *, exclusive: bool = False) -> OpenFile:  # noqa: ARG002
        """Create a file, or open an existing one without truncating it."""
        return self.open(path, create=True)


def _close_all(held: dict[Path, int]) -> None:
    while held:
        os.close(held.popitem()[1])
