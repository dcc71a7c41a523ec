"""Disks that one process alone sees, to lose power or to be too small."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["NO", "REMOUNT", "NotAllowed", "called", "mount", "private_mounts", "unmount"]

LIBRARY = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS = 0x20000  # of unshare(2)
REMOUNT, RECURSIVE, PRIVATE = 0x20, 0x4000, 0x40000  # of mount(2)
DETACH = 2  # of umount2(2)

NO = "this machine does not allow"


class NotAllowed(SystemExit):
    """Why this machine does not give a process such a disk: what a command says as it ends."""


def called(name, *arguments):
    """Call the C library, which tells the system."""
    passed = [os.fsencode(each) if isinstance(each, str | Path) else each for each in arguments]
    result = getattr(LIBRARY, name)(*passed)
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(device, place, system, flags=0, options=""):
    """Mount a file system."""
    called("mount", device, place, system, ctypes.c_ulong(flags), options)


def unmount(place, *, at_once=True):
    """Unmount one; if at once, an error where anything of it is in use."""
    called("umount2", place, 0 if at_once else DETACH)


def private_mounts():
    """Let what this process mounts be seen by it and its children alone, and go with them.

    Who is not root begins again in a name space where it is, and can mount a disk in memory.
    """
    if os.geteuid() != 0:
        begin_again_as_root()
    try:
        called("unshare", NEW_MOUNTS)
        mount("none", "/", "none", RECURSIVE | PRIVATE)
    except OSError as error:
        raise NotAllowed(f"{NO} mounts of one's own: {error}") from error


def begin_again_as_root():
    """Run the command of this process once more, as root in a name space of its own."""
    python = ["unshare", "-rm", sys.executable]
    try:
        subprocess.run([*python, "-c", ""], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotAllowed(f"{NO} users of one's own: {error}") from error
    raise SystemExit(subprocess.run([*python, *sys.orig_argv[1:]], check=False).returncode)
