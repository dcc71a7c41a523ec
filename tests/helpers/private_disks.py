"""Private mounts of one process, to simulate power failures or a full disk."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

__all__ = [
    "NOT_ALLOWED",
    "REMOUNT",
    "PrivateDiskUnavailable",
    "call_libc",
    "mount",
    "unmount",
    "use_private_mounts",
]

LIBRARY = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS = 0x20000  # of unshare(2)
REMOUNT, RECURSIVE, PRIVATE = 0x20, 0x4000, 0x40000  # of mount(2)
DETACH = 2  # of umount2(2)

NOT_ALLOWED = "this machine does not allow"


class PrivateDiskUnavailable(SystemExit):
    """This machine does not allow private mounts; exits the command with the reason."""


def call_libc(name, *arguments):
    """Call a function of the C library; raise OSError if it fails."""
    encoded = [os.fsencode(each) if isinstance(each, str | Path) else each for each in arguments]
    result = getattr(LIBRARY, name)(*encoded)
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(device, directory, system, flags=0, options=""):
    """Mount a file system."""
    call_libc("mount", device, directory, system, ctypes.c_ulong(flags), options)


def unmount(directory, *, at_once=True):
    """Unmount a file system; with `at_once`, fail if it is in use, otherwise unmount lazily."""
    call_libc("umount2", directory, 0 if at_once else DETACH)


def use_private_mounts():
    """Enter a private mount namespace, which disappears with this process and its children.

    A process that is not root reruns itself as root of a user namespace, where it can mount tmpfs.
    """
    if os.geteuid() != 0:
        rerun_as_root()
    try:
        call_libc("unshare", NEW_MOUNTS)
        mount("none", "/", "none", RECURSIVE | PRIVATE)
    except OSError as error:
        raise PrivateDiskUnavailable(f"{NOT_ALLOWED} private mounts: {error}") from error


def rerun_as_root():
    """Rerun the command of this process as root in a new user namespace."""
    python = ["unshare", "-rm", sys.executable]
    try:
        subprocess.run([*python, "-c", ""], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PrivateDiskUnavailable(f"{NOT_ALLOWED} user namespaces: {error}") from error
    raise SystemExit(subprocess.run([*python, *sys.orig_argv[1:]], check=False).returncode)
