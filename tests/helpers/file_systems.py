"""File systems in image files, for a test or a campaign: whatever this machine can mount."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

__all__ = ["FILE_SYSTEMS", "FileSystemUnavailable", "mounted"]

IMAGE_BYTES = 400 * 2**20  # sparse; XFS needs 300 MiB


class FileSystemUnavailable(Exception):  # noqa: N818  # not an error: the reason to skip a test
    """This machine cannot mount a file system; the message is the reason."""


def call(*command):
    """Run a command; raise FileSystemUnavailable with its output if it fails."""
    if shutil.which(command[0]) is None:
        raise FileSystemUnavailable(f"{command[0]} is not installed")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise FileSystemUnavailable(f"{command[0]}: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout.strip()


def make_image(directory, *format_command):
    image = directory / "image"
    image.touch()
    os.truncate(image, IMAGE_BYTES)
    call(*format_command, image)
    return image


def mount_ext4(directory, mount_point):
    image = make_image(directory, "mkfs.ext4", "-q")
    call("mount", "-o", "loop", image, mount_point)


def mount_xfs(directory, mount_point):
    image = make_image(directory, "mkfs.xfs", "-q")
    call("mount", "-o", "loop", image, mount_point)


def mount_btrfs(directory, mount_point):
    image = make_image(directory, "mkfs.btrfs", "-q")
    call("mount", "-o", "loop", image, mount_point)


def mount_tmpfs(directory, mount_point):
    call("mount", "-t", "tmpfs", "none", mount_point)


def layers(directory):
    for name in ("lower", "upper", "work"):
        (directory / name).mkdir(exist_ok=True)
    return ",".join(f"{name}={directory / path}" for name, path in (
        ("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")))  # fmt: skip


def mount_overlay(directory, mount_point):
    call("mount", "-t", "overlay", "overlay", "-o", layers(directory), mount_point)


def mount_fuse_overlay(directory, mount_point):
    call("fuse-overlayfs", "-o", layers(directory), mount_point)


def mount_bindfs(directory, mount_point):
    (directory / "below").mkdir()
    call("bindfs", directory / "below", mount_point)


def mount_ntfs(directory, mount_point):
    """Mount NTFS such that names that differ in case are the same, as on Windows."""
    image = make_image(directory, "mkfs.ntfs", "-F", "-q", "-f")
    call("lowntfs-3g", "-o", "ignore_case", image, mount_point)


def mount_exfat(directory, mount_point):
    image = make_image(directory, "mkfs.exfat")
    device = call("losetup", "--find", "--show", image)
    try:
        call("mount.exfat-fuse", device, mount_point)
    finally:
        call("losetup", "--detach", device)  # once it is unmounted


FILE_SYSTEMS = {
    "ext4": mount_ext4,
    "xfs": mount_xfs,
    "btrfs": mount_btrfs,
    "tmpfs": mount_tmpfs,
    "overlay": mount_overlay,
    "fuse-overlayfs": mount_fuse_overlay,
    "bindfs": mount_bindfs,
    "ntfs": mount_ntfs,
    "exfat": mount_exfat,
}


@contextlib.contextmanager
def mounted(name, directory):
    """Mount a new file system in an empty directory, which holds its data too; yield its root.

    Raises
    ------
    FileSystemUnavailable
        If this machine lacks the programs, the kernel modules or the permission.
    """
    if os.geteuid() != 0:
        raise FileSystemUnavailable("only root can mount file systems")
    mount_point = directory / "mounted"
    mount_point.mkdir()
    FILE_SYSTEMS[name](directory, mount_point)
    try:
        yield mount_point
    finally:
        call("umount", "--lazy", mount_point)
