"""Damaged files are read correctly or rejected with a typed error.

    python -m tests.campaigns.fuzz --seed 1      # a million inputs, some minutes; prints its counts
    python -m tests.campaigns.fuzz --size 20000  # so many inputs in all

What is read: headers and files of .npy arrays, files of Zarr arrays, journals of runs into a new
file, redo logs of runs in place, manifests. An input is a valid file that was truncated at some
byte, or of which some bit was flipped; or that was edited in several places; or whose fields were
exchanged for others and sealed again, with the right checksum, as someone does who means harm. Of
each input is asked:

- it is accepted, or refused with an error of fastvgg that names the file and says what to do, on
  lines that a terminal shows as they are; nothing else is raised, and nothing is warned of;
- what numpy refuses in a .npy file is refused, and what both accept is the same to both;
- what zarr-python reads of an array is what is read of it, and no damage that a checksum or a
  compressor notices is passed over;
- of a journal only the lines before the first incomplete one are accepted;
- accepted numbers are integers in their range, not true or 1.0;
- a redo log with one wrong bit is rejected, or recovers the right bytes;
- nothing on the disk grows, and what is read stays as it is;
- it takes little time, and little memory.

One input in `SAMPLED` is read with every allocation counted; the time of the others is measured,
and what would take more than `ADDRESS_SPACE_BYTES` is refused by the system.
"""

from __future__ import annotations

import contextlib
import faulthandler
import resource
import sys
import tempfile
import time
import tracemalloc
import warnings
from itertools import islice
from pathlib import Path
from random import Random

from tests.campaigns.command import main
from tests.campaigns.fuzz_kinds.arrays import NpyFiles, NpyHeaders, ZarrArrays
from tests.campaigns.fuzz_kinds.records import ChecksummedLines, Journals, Manifests
from tests.campaigns.fuzz_kinds.redo_logs import RedoLogHeaders, RedoLogs
from tests.helpers.datasets_on_disk import check_error, names_in
from tests.helpers.faults import memory_directory

SIZE = 1_000_000
SAMPLED = 64
MEMORY_BYTES = 8 * 2**20  # at most, for any input; the longest has some tens of kilobytes
ADDRESS_SPACE_BYTES = 2**30  # for all that is allocated in the campaign
MAX_SECONDS = 1.0  # of one core's time, at most
HANG_SECONDS = 120
MAX_MESSAGE_CHARACTERS = 1000

KINDS = (
    NpyHeaders,
    NpyFiles,
    ZarrArrays,
    ChecksummedLines,
    Journals,
    Manifests,
    RedoLogHeaders,
    RedoLogs,
)


class WrongError(AssertionError):
    """An input that was not handled correctly."""


class Reader:
    """Reads inputs of one kind, one after another, and keeps count."""

    def __init__(self, kind):
        self._kind = kind
        self.inputs = 0
        self.accepted = 0
        self.slowest_ns = 0
        self.largest_bytes = 0

    def read(self, content):
        """Read an input; raise `WrongError` with the input if a check fails."""
        self.inputs += 1
        try:
            if self.inputs % SAMPLED:
                self._check(content, *self._read_timed(content))
            else:
                self._check(content, *self._read_traced(content))
        except Exception as error:
            which = f"{self._kind.name}, input {self.inputs}"
            raise WrongError(f"{which}: {error!r}: {content!r}"[:20_000]) from error

    def _try_read(self, content):
        try:
            return self._kind.read(content), None
        except self._kind.error_type as error:
            return None, error

    def _read_timed(self, content):
        begun = time.thread_time_ns()
        found, error = self._try_read(content)
        took_ns = time.thread_time_ns() - begun
        self.slowest_ns = max(self.slowest_ns, took_ns)
        assert took_ns < MAX_SECONDS * 1e9
        return found, error

    def _read_traced(self, content):
        tracemalloc.start()
        try:
            found, error = self._try_read(content)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        self.largest_bytes = max(self.largest_bytes, peak_bytes)
        assert peak_bytes < MEMORY_BYTES
        return found, error

    def _check(self, content, found, error):
        assert error is None or content not in self._kind.valid_inputs
        self._kind.check(content, found, error)
        self.accepted += found is not None
        if error is not None:
            check_error(error, self._kind.path.name)
            message = str(error)
            assert len(message) < MAX_MESSAGE_CHARACTERS
            assert message.replace("\n", "").isprintable(), ascii(message)


def raise_warning(message, category, filename, lineno, file=None, line=None):
    raise AssertionError(f"warned: {category.__name__}: {message}")


def read_all(kind, share):
    """Read so many inputs of a kind."""
    reader = Reader(kind)
    with contextlib.closing(kind):
        names = names_in(kind.place)
        try:
            for number, content in enumerate(islice(kind.inputs(), share)):
                if number % 1000 == 0:
                    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
                reader.read(content)
        finally:  # or what calls this is ended after a reading that went wrong
            faulthandler.cancel_dump_traceback_later()
        assert names_in(kind.place) == names
    return reader


@contextlib.contextmanager
def limited_memory():
    """Limit the address space to `ADDRESS_SPACE_BYTES` more than is in use."""
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE_BYTES, hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def campaign(seed, size):
    """Read inputs of every kind, `size` in all; raise at the first that goes wrong."""
    counts = {"inputs": 0}
    readers = []
    with warnings.catch_warnings(), limited_memory():
        warnings.simplefilter("always")
        warnings.showwarning = raise_warning
        for kind in KINDS:
            with tempfile.TemporaryDirectory(dir=memory_directory()) as directory:
                random = Random(f"{seed} {kind.name}")  # noqa: S311  # not for secrets
                readers.append(read_all(kind(Path(directory), random), round(size * kind.share)))
            counts[kind.name] = readers[-1].inputs
            counts["inputs"] += readers[-1].inputs
    accepted = sum(reader.accepted for reader in readers)
    return {
        **counts,
        "accepted": accepted,
        "refused": counts["inputs"] - accepted,
        "slowest_us": max(reader.slowest_ns for reader in readers) // 1000,
        "largest_kib": max(reader.largest_bytes for reader in readers) // 1024,
        "wrong": 0,
    }


if __name__ == "__main__":
    main(campaign, __doc__, size=SIZE)
