"""A lock that a fork waits for, held while something is imported or compiled on first use.

A child has no other threads: it could never import or compile what one of them was importing or
compiling. A fork waits a second or two at most.
"""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import logging
import os
import threading
from typing import Final

fork_lock: Final = threading.RLock()

# `before` hooks run in reverse order of registration, and the one of this lock has to run first: an
# import or a compilation may need the locks that the hooks of these modules acquire. So import them
# earlier.
MODULES_WITH_FORK_HOOKS: Final = (logging, concurrent.futures.thread)


def _release_after_fork() -> None:
    # A fork that waited for the import of this module has not acquired the lock.
    with contextlib.suppress(RuntimeError):
        fork_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=fork_lock.acquire,
        after_in_parent=_release_after_fork,
        after_in_child=_release_after_fork,
    )
