"""What is known about a file system and its mounts, without changing anything."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fastvgg.errors import TargetError, argument

if TYPE_CHECKING:
    from collections.abc import Iterator

NETWORK_FILE_SYSTEMS: Final = (
    *("9p", "afs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4"),
    *("ocfs2", "smb2", "smb3", "smbfs", "virtiofs"),
)
MOUNTS: Final = Path("/proc/self/mountinfo")


def file_system_type(path: Path) -> str:
    """Return the type of the file system that contains a path, or "" if it is not known.

    The device number of a file does not say: on btrfs it is that of a subvolume, not of a mount.
    """
    real = Path(os.path.realpath(path))
    systems = dict(_mounts())  # of several at one mount point, the last is visible
    return next((systems[str(at)] for at in (real, *real.parents) if str(at) in systems), "")


def is_network_file_system(system: str) -> bool:
    """Whether other machines may write to it, or its locks and syncs may have no effect."""
    return system in NETWORK_FILE_SYSTEMS or system.startswith("fuse.")


def is_mount_point(path: Path) -> bool:
    """Whether something is mounted at a path: a disk, a container's volume or a bind-mounted file.

    Neither a file nor a directory can then be renamed to that path.
    """
    if os.path.ismount(path):
        return True
    real = os.path.realpath(path)
    return any(mount_point == real for mount_point, _ in _mounts())


def _mounts() -> Iterator[tuple[str, str]]:
    """Yield the mount point and the type of each mount, in their order; none if not on Linux."""
    try:
        with MOUNTS.open(encoding="utf-8", errors="surrogateescape") as mounts:
            for mount in mounts:
                fields, _, rest = mount.partition(" - ")
                yield _unescape(fields.split(" ")[4]), rest.split(" ")[0]
    except (FileNotFoundError, PermissionError):  # not Linux, or in a sandbox
        return


def _unescape(path: str) -> str:
    """Decode the octal escapes of blanks and backslashes in a mount point."""
    return re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), path)


def check_in_place_supported(path: Path) -> None:
    """Check that a file can be overwritten in place safely; raise TargetError otherwise."""
    status, system = path.lstat(), file_system_type(path)
    if path.is_symlink():
        problem, remedy = "is a symbolic link", f"give the file itself: {path.resolve()}"
    elif status.st_nlink > 1:
        problem = f"has {status.st_nlink} hard links, and would change under all of their names"
        remedy = "copy it, and convert the copy"
    elif status.st_blocks * 512 < status.st_size:
        problem = (
            f"is sparse: it has {status.st_size} bytes, but only {status.st_blocks * 512} of them "
            "are allocated on disk"
        )
        remedy = "make a copy without holes: cp --sparse=never"
    elif is_network_file_system(system):
        problem = f"is on {system}, where another machine may write it at the same time"
        remedy = f"write a new file: give a {argument('target')}"
    elif not os.access(path, os.R_OK | os.W_OK):
        problem, remedy = "is not writable", "check its permissions"
    else:
        return
    raise TargetError(f"{path} {problem}", remedy)
