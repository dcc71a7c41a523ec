"""Kill and resume runs on every file system that this machine can mount.

    python -m tests.campaigns.file_systems               # takes minutes; prints counts
    python -m tests.campaigns.file_systems --size 100    # approximate number of kills on each

On each file system, a process is killed before or halfway through any call of `storage.local`, as
in `tests.campaigns.kills`, for every format of targets and in place. A file system that cannot be
mounted here is named with the reason; in place is refused on those that other machines may write.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from fastvgg.storage.file_systems import file_system_type, is_network_file_system
from tests.campaigns import kills
from tests.campaigns.command import main
from tests.helpers.file_systems import FILE_SYSTEMS, FileSystemUnavailable, mounted


def kill_on(name, seed, size):
    """Kill about `size` processes on a file system; return their number."""
    directory = Path(tempfile.mkdtemp(prefix="fastvgg-file-system-"))
    try:
        with mounted(name, directory) as root:
            settings = kills.ALL_SETTINGS
            if is_network_file_system(file_system_type(root)):
                settings = [each for each in settings if not each.get("in_place")]
            return kills.campaign(seed, size, root, settings)["kills"]
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # an unmounted disk may be in use for a moment


def campaign(seed, size, names=tuple(FILE_SYSTEMS)):
    """Kill about `size` processes on each file system; return their number on each."""
    counts = {}
    for name in names:
        try:
            counts[f"kills on {name}"] = kill_on(name, seed, size)
        except FileSystemUnavailable as reason:
            sys.stderr.write(f"{name} is not available: {reason}\n")
    return {**counts, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=1_000)
