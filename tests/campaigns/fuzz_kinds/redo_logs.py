"""Redo logs of in-place runs, and their headers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from types import SimpleNamespace

import numpy as np
import xxhash

from fastvgg.errors import FastvggError, ResumeError
from fastvgg.storage.local import Storage
from fastvgg.stream import redo_log_layout
from fastvgg.stream.journal import journal_path
from fastvgg.stream.redo_log import RedoLog
from fastvgg.stream.redo_log_reader import (
    check_lengths,
    committed_chunks,
    read_redo_log_header,
)
from tests.campaigns.fuzz_kinds.base import (
    FINGERPRINT,
    REDO_LOG_SHAPE,
    Kind,
    ReusedFile,
    check_info,
)
from tests.campaigns.fuzz_kinds.records import check_counts, check_job, consistent_changes
from tests.helpers.damage import (
    RUN,
    TOKENS,
    corrupt_json,
    damaged,
    interleave_inputs,
    line_with_checksum,
    truncations_and_bit_flips,
    valid_prefix_bytes,
)
from tests.helpers.datasets_on_disk import plan_of, save_npy


class RedoLogFiles:
    """A partially converted .npy file and its redo log, after each chunk."""

    CHUNK_IMAGES = 2

    def __init__(self, directory):
        self.path = directory / "r.npy"
        self.storage = Storage(fsync=False)
        old = np.arange(math.prod(REDO_LOG_SHAPE), dtype=np.float32).reshape(REDO_LOG_SHAPE)
        save_npy(self.path, old)
        self.old = self.path.read_bytes()
        job = plan_of(self.path, None, in_place=True, mode="caffe").job
        self.job = dataclasses.replace(job, source="/data/r.npy", fingerprint=FINGERPRINT)
        self.data = self.storage.open(self.path)
        self._record()
        self.journal = ReusedFile(journal_path(self.path))

    def split(self, content):
        """Split a redo log into its header and the rest."""
        return content[: self.header.header_bytes], content[self.header.header_bytes :]

    def _record(self):
        """Run the conversion, and record both files after each commit."""
        original_secrets = redo_log_layout.secrets
        redo_log_layout.secrets = SimpleNamespace(token_hex=lambda count: RUN)
        try:
            log = RedoLog.begin(self.storage, self.data, self.job, self.CHUNK_IMAGES)
        finally:
            redo_log_layout.secrets = original_secrets
        self.header = dataclasses.replace(read_redo_log_header(self.path), inode=2)
        first = self.header.to_bytes().ljust(self.header.header_bytes, b"\0")
        journal = journal_path(self.path)
        self.states = []
        for chunk in range(self.header.chunks + 1):
            content = first + self.split(journal.read_bytes())[1]
            if chunk in (0, 1, 3, 6, self.header.chunks):
                self.states.append((content, self.file_after(chunk), chunk))
            if chunk in (1, 2, 5):  # committed, but not in the file yet, nor in a checkpoint
                self.states.append((content, self.file_after(chunk - 1), chunk))
            if chunk < self.header.chunks:
                self._put(log, chunk)
        log.close()

    def file_after(self, chunks):
        """Return the content of the file after `chunks` chunks are converted."""
        begin = self.header.data_offset
        end = self.header.image_span(chunks - 1)[1] if chunks else begin
        new = np.bitwise_not(np.frombuffer(self.old[begin:end], np.uint8)).tobytes()
        return self.old[:begin] + new + self.old[end:]

    def _put(self, log, chunk):
        before, after = self.file_after(chunk), self.file_after(chunk + 1)
        begin, end = self.header.page_span(chunk)
        first, last = self.header.image_span(chunk)
        old = xxhash.xxh3_64_hexdigest(before[first:last])
        pages = memoryview(after[begin:end])
        log.stage(chunk, pages)
        log.commit(log.make_record(chunk, pages, old=old), pages)

    def close(self):
        self.storage.close(self.data)
        self.journal.close()


class RedoLogKind(Kind):
    """A redo log, or part of one, and the file that it belongs to."""

    error_type = ResumeError

    def __init__(self, directory, random):
        super().__init__(directory, random)
        self._files = RedoLogFiles(directory)
        self.path = self._files.path
        self.close = self._files.close


class RedoLogHeaders(RedoLogKind):
    """Header lines of redo logs; the rest of the redo log is valid."""

    name, share = "redo log headers", 0.05

    def __init__(self, directory, random):
        super().__init__(directory, random)
        self._line = self._files.header.to_bytes()
        first, self._rest = self._files.split(self._files.states[-1][0])
        self.valid_inputs = [first]

    def inputs(self):
        lines = truncations_and_bit_flips(self.random, [self._line])
        return interleave_inputs(self.random, map(self._pad, lines), self._input)

    def _pad(self, line):
        return line.ljust(self._files.header.header_bytes, b"\0")

    def mutated(self):
        random, text = self.random, self._line[17:-1]
        roll = random.random()
        if roll < 0.2:
            return self._pad(damaged(random, self._line))
        change = consistent_changes if roll < 0.4 else corrupt_json if roll < 0.9 else damaged
        return self._pad(line_with_checksum(change(random, text)))

    def read(self, content):
        self._files.journal.put(content + self._rest)
        header = read_redo_log_header(self.path)
        if header is not None:
            assert committed_chunks(header, self.path) <= header.chunks
            assert str(self.path) in header.command(self.path)
            with contextlib.suppress(FastvggError):
                header.job.check_same(self._files.job, str(self.path))
            with contextlib.suppress(FastvggError):
                check_lengths(header, self.path)
        return header

    def check(self, content, result, error):
        assert self._files.journal.get() == content + self._rest
        length = valid_prefix_bytes(content.partition(b"\n")[0] + b"\n")
        if length == 0:  # only the header of another kind of journal is no error
            assert error is not None or b"fastvgg-journal" in content[:40]
        if content[:length] == self._line:
            assert result == self._files.header
        if result is not None or len(content) % 8 == 0:
            check_info(self.path, expected=result is not None)
        if result is None:
            return
        assert result.to_bytes() == content[:length]
        images = check_job(result.job)
        check_counts(result.chunk_images, result.file_bytes, result.chunks)
        assert result.chunks == -(-images // result.chunk_images)
        assert 0 <= result.data_offset < result.file_bytes


class RedoLogs(RedoLogKind):
    """Complete redo logs, opened and recovered."""

    name, share = "redo logs", 0.05

    def __init__(self, directory, random):
        super().__init__(directory, random)
        header = self._files.header
        self._checkpoints = [header.checkpoint_offset(copy) for copy in range(2)]
        self._slots = [header.slot_offset(chunk) for chunk in range(redo_log_layout.SLOTS)]
        self._records = [
            header.record_offset(chunk) for chunk in range(header.chunks)
        ] + self._slots

    def inputs(self):
        """Yield whether a single bit is wrong, both files, and the number of committed chunks."""
        while True:
            content, data, committed = self.random.choice(self._files.states)
            roll = self.random.random()
            if roll < 0.5:
                content = self._flip_bit(content)
            elif roll < 0.6:
                content = self._change_length(content)
            else:
                content = self._changed(content)
            yield roll < 0.5, content, data, committed

    def _flip_bit(self, content):
        random = self.random
        if random.random() < 0.3:
            begin = random.choice(self._slots) + redo_log_layout.PAGE_BYTES
            length = self._files.header.slot_bytes
        else:
            begin, length = random.choice([0, *self._checkpoints, *self._records]), 200
        at = begin + random.randrange(length)
        flipped = bytes([content[at] ^ 1 << random.randrange(8)])
        return content[:at] + flipped + content[at + 1 :]

    def _change_length(self, content):
        if self.random.random() < 0.2:
            return content + self.random.choice(TOKENS)
        return content[: self.random.randrange(len(content))]

    def _changed(self, content):
        """Change the fields of a line; write a changed first checkpoint if there is none."""
        random = self.random
        offset = random.choice(self._checkpoints if random.random() < 0.4 else self._records)
        origin = offset if content[offset] else self._checkpoints[0]
        text = content[origin : origin + redo_log_layout.RECORD_BYTES].partition(b"\n")[0][17:]
        change = corrupt_json if random.random() < 0.8 else damaged
        line = line_with_checksum(change(random, text))[: redo_log_layout.RECORD_BYTES]
        return content[:offset] + line + content[offset + len(line) :]

    def read(self, case):
        _, content, data, _ = case
        self._files.journal.put(content)
        os.pwrite(self._files.data.descriptor, data, 0)
        header = read_redo_log_header(self.path)
        if header is None:
            return None
        check_lengths(header, self.path)
        header.job.check_same(self._files.job, str(self.path))
        with contextlib.suppress(ResumeError):
            assert committed_chunks(header, self.path) <= header.chunks
        log = RedoLog.reopen(self._files.storage, self._files.data, header)
        try:
            return log.recover(1, lambda chunk: None), log.finish()
        finally:
            log.close()

    def check(self, case, result, error):
        is_bit_flip, content, data, committed = case
        after = self.path.read_bytes()
        assert len(after) == len(data)
        assert len(self._files.journal.get()) == len(content)
        if len(content) != self._files.header.journal_bytes:
            assert result is None
            assert error is not None or len(content) < 40  # too short to be identified
            return
        assert (result is None) == (error is not None)
        if result is None:
            return
        chunks, checksums = result
        header = self._files.header
        assert type(chunks) is int
        assert 0 <= chunks <= header.chunks == len(checksums)
        if is_bit_flip:
            assert committed - 1 <= chunks <= committed
            assert after == self._files.file_after(chunks)
            spans = [slice(*header.image_span(chunk)) for chunk in range(chunks)]
            assert checksums[:chunks] == [xxhash.xxh3_64_hexdigest(after[span]) for span in spans]
