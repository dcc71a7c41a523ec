"""Check that damaged files are read correctly or rejected with a typed error.

    python -m tests.campaigns.fuzz --seed 1      # a million inputs, takes minutes; prints counts
    python -m tests.campaigns.fuzz --size 20000  # total number of inputs

The targets are .npy headers and files, Zarr arrays, journals of runs into a new file, redo logs of
in-place runs, and manifests. An input is a valid file that is truncated, has a flipped bit, has
several edits, or has malicious field values under a correct checksum. For each input:

- it is accepted, or rejected with a fastvgg error that names the file and the remedy, in printable
  characters; there are no other exceptions and no warnings;
- a .npy file that NumPy rejects is rejected, and if both accept it, they read the same array;
- a Zarr array reads as in zarr-python, and all damage that a checksum or a compressor detects is
  reported;
- only the lines of a journal before the first incomplete one are accepted;
- accepted numbers are integers within their range, not true or 1.0;
- a redo log with one flipped bit is rejected, or recovers the right bytes;
- no file is created or extended, and the input is unchanged;
- time and memory are bounded.

One input in `TRACE_INTERVAL` is read under tracemalloc; the others are timed, and allocations
beyond `ADDRESS_SPACE_BYTES` fail.
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
TRACE_INTERVAL = 64
MEMORY_BYTES = 8 * 2**20  # maximum per input; the longest input has tens of kilobytes
ADDRESS_SPACE_BYTES = 2**30  # for all allocations of the campaign
MAX_SECONDS = 1.0  # of CPU time per input
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
    """Reads inputs of one kind and counts them."""

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
            if self.inputs % TRACE_INTERVAL:
                self._check(content, *self._read_timed(content))
            else:
                self._check(content, *self._read_traced(content))
        except Exception as error:
            label = f"{self._kind.name}, input {self.inputs}"
            raise WrongError(f"{label}: {error!r}: {content!r}"[:20_000]) from error

    def _try_read(self, content):
        try:
            return self._kind.read(content), None
        except self._kind.error_type as error:
            return None, error

    def _read_timed(self, content):
        start_ns = time.thread_time_ns()
        result, error = self._try_read(content)
        elapsed_ns = time.thread_time_ns() - start_ns
        self.slowest_ns = max(self.slowest_ns, elapsed_ns)
        assert elapsed_ns < MAX_SECONDS * 1e9
        return result, error

    def _read_traced(self, content):
        tracemalloc.start()
        try:
            result, error = self._try_read(content)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        self.largest_bytes = max(self.largest_bytes, peak_bytes)
        assert peak_bytes < MEMORY_BYTES
        return result, error

    def _check(self, content, result, error):
        assert error is None or content not in self._kind.valid_inputs
        self._kind.check(content, result, error)
        self.accepted += result is not None
        if error is not None:
            check_error(error, self._kind.path.name)
            message = str(error)
            assert len(message) < MAX_MESSAGE_CHARACTERS
            assert message.replace("\n", "").isprintable(), ascii(message)


def raise_warning(message, category, filename, lineno, file=None, line=None):
    raise AssertionError(f"warned: {category.__name__}: {message}")


def read_all(kind, count):
    """Read `count` inputs of a kind."""
    reader = Reader(kind)
    with contextlib.closing(kind):
        names = names_in(kind.directory)
        try:
            for number, content in enumerate(islice(kind.inputs(), count)):
                if number % 1000 == 0:
                    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
                reader.read(content)
        finally:  # or else the watchdog ends the calling process after a failure
            faulthandler.cancel_dump_traceback_later()
        assert names_in(kind.directory) == names
    return reader


@contextlib.contextmanager
def limited_memory():
    """Limit the address space to the current size plus `ADDRESS_SPACE_BYTES`."""
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
    """Read `size` inputs of all kinds; raise at the first failure."""
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
