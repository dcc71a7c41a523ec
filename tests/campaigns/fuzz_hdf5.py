"""HDF5 files that were damaged are read as h5py reads them, or refused in words.

    python -m tests.campaigns.fuzz_hdf5 --seed 1  # a hundred thousand inputs, some minutes

An input is a whole file that was cut at some byte, or of which some bits were flipped, or some
bytes zeroed. Of each is asked that it is accepted, and then is to fastvgg what it is to h5py; or
that it is refused with an error of fastvgg that names the file and says what to do, on lines that a
terminal shows as they are. Where all that there is in a file has a checksum, what is accepted is
right. The file stays as it is.

HDF5 itself ends the process over some files whose chunks are found without checksums, so inputs are
read in processes of their own, and what it ended is counted. Virtual datasets are left out: they
are refused, and on damaged ones it hangs.
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

from fastvgg.datasets.base import Header, bytes_of
from fastvgg.datasets.open import open_source, open_target
from fastvgg.errors import FastvggError
from fastvgg.storage.local import Storage
from fastvgg.storage.location import Location
from tests.campaigns.command import main
from tests.helpers.datasets_on_disk import must_say, pixels
from tests.helpers.faults import quick_directory

SIZE = 100_000
NAME = "/deep/images"
HANG_S = 10  # of one core's time
BATCH = pixels(5, 3, 5)
CHUNKED = {"chunks": (2, 3, 2, 3), "compression": "gzip"}


def made(file=(), **settings):
    """The bytes of a file that h5py writes, with a link to its only dataset."""
    written = io.BytesIO()
    with h5py.File(written, "w", **dict(file)) as opened:
        opened.create_dataset("stored", data=BATCH, **settings)
        opened[NAME] = h5py.SoftLink("/stored")
    return written.getvalue()


def ours():
    """The bytes of a file that fastvgg writes."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "y.h5"
        header = Header(BATCH.shape, str(BATCH.dtype), "NHWC")
        target = open_target(
            Location.parse(Path(f"{path}::{NAME}")), header, Storage(fsync=False), chunk_images=1
        )
        target.create()
        target.write(0, [bytes_of(BATCH)])
        target.publish()
        return path.read_bytes()


LATEST = {"libver": "latest"}
SEALED = made(LATEST, **CHUNKED, shuffle=True, fletcher32=True)  # all of it has checksums
WHOLES = (SEALED, made(), made(LATEST), made(**CHUNKED), made(maxshape=(9, 3, 5, 3)), ours())


def damaged(random, whole):
    """Bytes of which some are not what they were, and whether any is."""
    content = bytearray(whole)
    if random.random() < 0.02:
        return whole
    if random.random() < 0.1:
        return whole[: random.randrange(len(whole))]
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        at = random.randrange(len(content))
        if random.random() < 0.7:
            content[at] ^= 1 << random.randrange(8)
        else:
            length = len(content[at : at + random.choice([1, 2, 8, 64])])
            content[at : at + length] = random.choice([b"\0", b"\xff"]) * length
    return bytes(content)


def as_h5py_reads(path):
    with h5py.File(path, "r") as file:
        stored = file[NAME]
        return stored[...].astype(stored.dtype.newbyteorder("="), copy=False)


def check(path, whole, content):
    """Read an input; return whether it was accepted."""
    path.write_bytes(content)
    refusal = None
    try:
        with contextlib.closing(open_source(Location.parse(Path(f"{path}::{NAME}")))) as source:
            header = source.header
            batch = source.read(0, header.images).batch
            again = np.empty_like(batch)
            source.read_into(0, again)
    except FastvggError as error:
        refusal = error
    assert path.read_bytes() == content
    if refusal is not None:
        assert content != whole
        must_say(refusal, path.name)
        assert str(refusal).replace("\n", "").isprintable(), ascii(str(refusal))
        return False
    expected = BATCH if whole in (SEALED, content) else as_h5py_reads(path)
    assert (header.shape, header.dtype) == (expected.shape, str(expected.dtype))
    assert batch.tobytes() == again.tobytes() == expected.tobytes()
    return True


def read_some(path, seed, numbers, told):
    """Read inputs of these numbers; tell of each before it is read, and after."""
    for number in numbers:
        print(json.dumps({"began": number}), file=told, flush=True)
        random = Random(f"{seed} {number}")  # noqa: S311  # not for secrets
        whole = random.choice(WHOLES)
        content = damaged(random, whole)
        signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)  # whose signal ends the process
        try:
            outcome = {"accepted": check(path, whole, content)}
        except Exception:  # noqa: BLE001  # whatever it is, it is wrong
            outcome = {"wrong": f"input {number}: {traceback.format_exc()}\n{content!r}"}
        print(json.dumps(outcome), file=told, flush=True)


def in_a_process(path, seed, numbers):
    """Read inputs in a process of their own; yield what it told, and what ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        warnings.simplefilter("error")
        os.close(reading)
        with contextlib.suppress(BrokenPipeError):
            read_some(path, seed, numbers, os.fdopen(writing, "w"))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:  # which, closed before its end, ends the other too
        yield from map(json.loads, told)
    yield {"ended": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}


def campaign(seed, size):
    """Read damaged files; raise at the first that goes wrong."""
    counts = {"inputs": size, "accepted": 0, "refused": 0, "ended by HDF5": 0}
    begin = 0
    with tempfile.TemporaryDirectory(dir=quick_directory()) as directory:
        while begin < size:
            process = in_a_process(Path(directory) / "x.h5", seed, range(begin, size))
            with contextlib.closing(process):
                for told in process:
                    if "began" in told:
                        begin = told["began"] + 1
                    elif "accepted" in told:
                        counts["accepted" if told["accepted"] else "refused"] += 1
                    elif told.get("ended") == -signal.SIGSEGV:
                        counts["ended by HDF5"] += 1
                    else:
                        assert told == {"ended": 0}, f"input {begin - 1}: {told.get('wrong', told)}"
    return counts


if __name__ == "__main__":
    sys.exit(main(campaign, __doc__, size=SIZE))
