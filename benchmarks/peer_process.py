"""Run a peer of images.py in a separate process."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

PEER_PROGRAM = Path(__file__).with_name("image_peers.py")


class PeerError(Exception):
    """A peer cannot be measured."""


class PeerProcess:
    """A peer in a separate process that runs an epoch on request."""

    def __init__(self, name, python, photographs, scratch, threads):
        self.images = len(photographs.readers)
        self._busy = False
        self._log = (scratch / "log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [python, PEER_PROGRAM, name, photographs.source, scratch, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):  # it has exited, which its reply reports
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def wait_until_ready(self):
        """Wait until the peer is ready, and return the versions of its packages."""
        reply = self._reply()
        if "missing" in reply:
            raise PeerError(reply["missing"])
        return reply["versions"]

    def run_epoch(self):
        """Make the peer produce all of its batches."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
        images = self._reply()["images"]
        self._busy = True
        if images != self.images:
            raise PeerError(f"it produced {images} of {self.images} images")

    def wait_until_idle(self):
        """Wait until the peer has released the memory of an epoch."""
        if self._busy:
            self._reply()
        self._busy = False

    def _reply(self):
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        raise PeerError(lines[-1] if lines else "it exited without output")
