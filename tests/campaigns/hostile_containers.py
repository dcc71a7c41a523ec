"""Check that damaged containers of every format never end the process, or exceed the memory limit.

    python -m tests.campaigns.hostile_containers --seed 1      # 500 containers; takes a minute
    python -m tests.campaigns.hostile_containers --size 20000

A container is a dataset of a .npy, part-*.npy, HDF5, Zarr (version 2, 3, compressed, sharded) or a
tar, with its manifest and index, or an unfinished run with its journal. One of its files has random
edits, or random field values if it is JSON. The command line reads it with `--memory 64MiB`, in a
process of its own. It does so within the limit, or refuses it, or lists failed images: with exit
code 0, 1, 3 or 5, and without a traceback. HDF5 itself crashes on some damaged files, which are
counted.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from pathlib import Path
from random import Random

import h5py
import numpy as np
import zarr

from tests.campaigns.command import main
from tests.helpers.damage import corrupt_json, damaged
from tests.helpers.datasets_on_disk import plan_of, save_images
from tests.helpers.faults import InterruptedStorage, SimulatedCrash, memory_directory
from tests.helpers.hostile_containers import BATCH, CODECS_V2, ORDINARY, save_zarr
from tests.helpers.hostile_runs import ALLOWED_BYTES, ALLOWED_CODES, in_child, preprocess
from tests.helpers.runs import run
from tests.helpers.tar_on_disk import png, save_tar

SIZE = 500
ROWS = {"chunks": (2, *BATCH.shape[1:])}
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE)


def npy(directory):
    np.save(directory / "x.npy", BATCH)
    return directory / "x.npy"


def parts(directory):
    (directory / "parts").mkdir()
    for number in range(2):
        np.save(directory / "parts" / f"part-{number}.npy", BATCH[4 * number :][:4])
    return directory / "parts"


def hdf5(directory, **settings):
    with h5py.File(directory / "x.h5", "w") as file:
        file.create_dataset("x", data=BATCH, **settings)
    return f"{directory}/x.h5::/x"


def tar(directory):
    return save_tar(directory / "x.tar", [(f"{row}.png", png(BATCH[row])) for row in range(3)])


def packed(directory):
    """An array with the manifest and the index that fastvgg wrote."""
    photos = save_images(directory / "photos", BATCH)
    plan_of(photos, directory / "x.npy", direction="pack", images_per_chunk=2).run()
    shutil.rmtree(photos)
    return directory / "x.npy"


def unfinished(directory):
    """A source, and a target of which two chunks are committed."""
    source = npy(directory)
    plan = plan_of(source, directory / "y.npy", mode="tf", images_per_chunk=2)
    try:
        run(plan, storage=InterruptedStorage(commits=2))
    except SimulatedCrash:
        return source
    raise AssertionError("the run was not interrupted")


KINDS = {
    "npy": npy,
    "parts": parts,
    "hdf5": hdf5,
    "chunked hdf5": lambda d: hdf5(d, **ROWS, compression="gzip", shuffle=True),
    "zarr": lambda d: save_zarr(d, compressors=None, **ROWS),
    "zarr, gzip": lambda d: save_zarr(d, compressors=zarr.codecs.GzipCodec(), **ROWS),
    "zarr, shards": lambda d: save_zarr(d, shards=BATCH.shape, **ROWS),
    "zarr v2": lambda d: save_zarr(d, zarr_format=2, compressors=CODECS_V2["zlib"], **ROWS),
    "tar": tar,
    "manifest and index": packed,
    "journal": unfinished,
}


def damage(random, directory):
    """Change one file of a container, more often one that is not an array's data."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    small = [path for path in files if path.suffix not in (".npy", ".partial")] or files
    path = random.choice(small if random.random() < 0.8 else files)
    content = path.read_bytes()
    if path.suffix == ".json" or path.name in (".zarray", ".zattrs"):
        path.write_bytes(corrupt_json(random, content))
        return
    at = random.choice([0, 0, max(0, len(content) - 600), random.randrange(len(content))])
    window = content[at : at + 600]  # most of a file is pixels
    path.write_bytes(content[:at] + damaged(random, window) + content[at + 600 :])


def campaign(seed, size):
    """Read `size` damaged containers; raise at the first that is not handled."""
    counts = {"containers": size, "read": 0, "failed images": 0, "refused": 0, "stopped": 0}
    counts |= {"crashes in HDF5": 0, "largest MiB": 0}
    with tempfile.TemporaryDirectory(dir=memory_directory()) as temporary:
        root = Path(temporary)
        for name, write in ORDINARY.items():  # imports what the formats need
            (root / name).mkdir()
            assert preprocess(write(root / name), root / name) == 0
        locations = {}
        for name, write in KINDS.items():
            (root / "intact" / name).mkdir(parents=True)
            locations[name] = str(write(root / "intact" / name))
        for number in range(size):
            random = Random(f"{seed} {number}")  # noqa: S311  # not for secrets
            name = random.choice([*KINDS])
            # Manifests and journals record absolute paths, so that each is damaged where it is.
            directory, kept = root / "intact" / name, root / "kept"
            shutil.copytree(directory, kept)
            damage(random, directory)
            code, grown_bytes, message = in_child(lambda: preprocess(locations[name], directory))  # noqa: B023
            shutil.rmtree(directory)
            kept.rename(directory)
            counts["largest MiB"] = max(counts["largest MiB"], grown_bytes >> 20)
            if "hdf5" in name and code in CRASHES:
                counts["crashes in HDF5"] += 1
                continue
            is_handled = code in ALLOWED_CODES and "Traceback" not in message
            assert is_handled, f"{name}, container {number}: exit code {code}: {message}"
            assert grown_bytes <= ALLOWED_BYTES, f"{name}, container {number}: {grown_bytes} bytes"
            outcome = {0: "read", 1: "failed images", 3: "refused", 5: "stopped"}[code]
            counts[outcome] += 1
    return counts


if __name__ == "__main__":
    sys.exit(main(campaign, __doc__, size=SIZE))
