"""Check that damaged HDF5 files are read as h5py reads them, or rejected with a typed error.

    python -m tests.campaigns.fuzz_hdf5 --seed 1  # a hundred thousand inputs, takes minutes

An input is a valid file that is truncated, has flipped bits, or has overwritten bytes. fastvgg
either reads it as h5py does, or rejects it with an error that names the file and the remedy, in
printable characters. If everything in a file has a checksum, accepted data are correct. The file is
unchanged.

HDF5 itself crashes on some files whose chunk index has no checksum, so inputs are read in child
processes, and the crashes are counted. Virtual datasets are excluded: fastvgg rejects them, and
HDF5 hangs on damaged ones.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from random import Random

import h5py
import numpy as np

from fastvgg.datasets.base import Header, byte_view
from fastvgg.datasets.open import open_source, open_target
from fastvgg.errors import FastvggError
from fastvgg.storage.local import Storage
from fastvgg.storage.location import Location
from tests.campaigns.command import main
from tests.helpers.datasets_on_disk import check_error, pixels
from tests.helpers.faults import memory_directory

SIZE = 100_000
NAME = "/deep/images"
HANG_SECONDS = 10  # of CPU time
BATCH = pixels(5, 3, 5)
CHUNKED = {"chunks": (2, 3, 2, 3), "compression": "gzip"}


def save_with_h5py(file=(), **settings):
    """Return a file written by h5py, with a soft link to its only dataset."""
    written = io.BytesIO()
    with h5py.File(written, "w", **dict(file)) as opened:
        opened.create_dataset("stored", data=BATCH, **settings)
        opened[NAME] = h5py.SoftLink("/stored")
    return written.getvalue()


def save_with_fastvgg():
    """Return a file written by fastvgg."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "y.h5"
        header = Header(BATCH.shape, str(BATCH.dtype), "NHWC")
        target = open_target(
            Location.parse(Path(f"{path}::{NAME}")), header, Storage(fsync=False), chunk_images=1
        )
        target.create()
        target.write(0, [byte_view(BATCH)])
        target.publish()
        return path.read_bytes()


LATEST = {"libver": "latest"}
# Everything in it has a checksum.
CHECKSUMMED = save_with_h5py(LATEST, **CHUNKED, shuffle=True, fletcher32=True)
VALID_FILES = (
    CHECKSUMMED,
    save_with_h5py(),
    save_with_h5py(LATEST),
    save_with_h5py(**CHUNKED),
    save_with_h5py(maxshape=(9, 3, 5, 3)),
    save_with_fastvgg(),
)


def damaged(random, intact):
    """Return a damaged copy of a file, or sometimes the file itself."""
    content = bytearray(intact)
    if random.random() < 0.02:
        return intact
    if random.random() < 0.1:
        return intact[: random.randrange(len(intact))]
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        at = random.randrange(len(content))
        if random.random() < 0.7:
            content[at] ^= 1 << random.randrange(8)
        else:
            length = len(content[at : at + random.choice([1, 2, 8, 64])])
            content[at : at + length] = random.choice([b"\0", b"\xff"]) * length
    return bytes(content)


def load_h5(path):
    with h5py.File(path, "r") as file:
        stored = file[NAME]
        return stored[...].astype(stored.dtype.newbyteorder("="), copy=False)


def check(path, intact, content):
    """Read an input; return whether it was accepted."""
    path.write_bytes(content)
    rejection = None
    try:
        with contextlib.closing(open_source(Location.parse(Path(f"{path}::{NAME}")))) as source:
            header = source.header
            batch = source.read(0, header.images).batch
            reread = np.empty_like(batch)
            source.read_into(0, reread)
    except FastvggError as error:
        rejection = error
    assert path.read_bytes() == content
    if rejection is not None:
        assert content != intact
        check_error(rejection, path.name)
        assert str(rejection).replace("\n", "").isprintable(), ascii(str(rejection))
        return False
    expected = BATCH if intact in (CHECKSUMMED, content) else load_h5(path)
    assert (header.shape, header.dtype) == (expected.shape, str(expected.dtype))
    assert batch.tobytes() == reread.tobytes() == expected.tobytes()
    return True


def read_inputs(path, seed, numbers, output):
    """Read inputs by number; print a message before and after each."""
    for number in numbers:
        print(json.dumps({"began": number}), file=output, flush=True)
        random = Random(f"{seed} {number}")  # noqa: S311  # not for secrets
        intact = random.choice(VALID_FILES)
        content = damaged(random, intact)
        signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS)  # SIGVTALRM ends the process
        try:
            outcome = {"accepted": check(path, intact, content)}
        except Exception:  # noqa: BLE001  # any other exception is a failure
            outcome = {"wrong": f"input {number}: {traceback.format_exc()}\n{content!r}"}
        print(json.dumps(outcome), file=output, flush=True)


def run_in_child_process(path, seed, numbers):
    """Read inputs in a child process; yield its messages and exit code."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        warnings.simplefilter("error")
        os.close(reading)
        with contextlib.suppress(BrokenPipeError):
            read_inputs(path, seed, numbers, os.fdopen(writing, "w"))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as output:  # closing it early also ends the child
        yield from map(json.loads, output)
    yield {"ended": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}


def campaign(seed, size):
    """Read damaged files; raise at the first failure."""
    counts = {"inputs": size, "accepted": 0, "refused": 0, "crashes in HDF5": 0}
    begin = 0
    with tempfile.TemporaryDirectory(dir=memory_directory()) as directory:
        while begin < size:
            process = run_in_child_process(Path(directory) / "x.h5", seed, range(begin, size))
            with contextlib.closing(process):
                for output in process:
                    if "began" in output:
                        begin = output["began"] + 1
                    elif "accepted" in output:
                        counts["accepted" if output["accepted"] else "refused"] += 1
                    elif output.get("ended") == -signal.SIGSEGV:
                        counts["crashes in HDF5"] += 1
                    else:
                        assert output == {"ended": 0}, (
                            f"input {begin - 1}: {output.get('wrong', output)}"
                        )
    return counts


if __name__ == "__main__":
    sys.exit(main(campaign, __doc__, size=SIZE))
