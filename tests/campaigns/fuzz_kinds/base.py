"""Kind: the interface of a kind of fuzz input."""

from __future__ import annotations

import json
import os

from fastvgg.errors import FastvggError
from fastvgg.stream.info import info
from tests.helpers.damage import interleave_inputs, truncations_and_bit_flips

FINGERPRINT = "f" * 32
REDO_LOG_SHAPE = (15, 11, 11, 3)  # of the float32 array that the redo log belongs to


class ReusedFile:
    """A file that stays open and is rewritten for each input."""

    def __init__(self, path):
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT)

    def put(self, content):
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))

    def get(self):
        return os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)

    def close(self):
        os.close(self.descriptor)


class Kind:
    """A kind of input: how inputs are generated, read and checked.

    Parameters
    ----------
    directory
        An empty directory.
    random
        The source of all random choices.
    """

    valid_inputs = ()  # must be accepted
    error_type = FastvggError  # raised for rejected inputs

    def __init__(self, directory, random):
        self.directory = directory
        self.random = random
        self._opened = []

    def reused(self, path):
        self._opened.append(ReusedFile(path))
        return self._opened[-1]

    def close(self):
        for file in self._opened:
            file.close()

    def inputs(self):
        return interleave_inputs(
            self.random, truncations_and_bit_flips(self.random, self.valid_inputs), self._input
        )

    def _input(self):
        return (
            self.random.choice(self.valid_inputs) if self.random.random() < 0.05 else self.mutated()
        )


def check_info(path, *, expected):
    """Check that `info` describes a path in JSON types."""
    try:
        described = info(path)
    except FastvggError:
        assert not expected
    else:
        json.dumps(described)
        assert described["path"] == str(path)
