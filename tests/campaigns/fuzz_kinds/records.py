"""Lines with a checksum, journals of runs into a new file, and manifests."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import fastvgg
from fastvgg.datasets.base import ImageRecord
from fastvgg.errors import FastvggError, ResumeError, SourceError
from fastvgg.imaging.decode import INTERPOLATIONS
from fastvgg.stream.destinations import make_destination
from fastvgg.stream.journal import Commit, read_journal
from fastvgg.stream.lines import decode_line, encode_line
from fastvgg.stream.manifest import Manifest, read_manifest
from fastvgg.stream.target import inspect_target, with_committed
from tests.campaigns.fuzz_kinds.base import FINGERPRINT, REDO_LOG_SHAPE, Kind, check_info
from tests.helpers.damage import (
    RUN,
    VALUES,
    corrupt_json,
    damaged,
    line_with_checksum,
    valid_prefix_bytes,
)
from tests.helpers.datasets_on_disk import pixels, plan_of, save_images, save_npy


class ChecksummedLines(Kind):
    """Lines with a checksum, in memory."""

    name, share = "checksummed lines", 0.15
    path = Path()

    def __init__(self, directory, random):
        super().__init__(directory, random)
        self._texts = [
            json.dumps(
                {"chunk": 1, "checksum": "1" * 16, "records": [["a.png", "", 9, 7, False, ""]]}
            ).encode(),
            json.dumps({"run": RUN, "generation": 7, "chunks": 6}).encode(),
            json.dumps({"a": [1, 2.5, None, {"b": "\u00e9"}], "c": True}).encode(),
        ]
        for text in self._texts:
            assert encode_line(json.loads(text)) == line_with_checksum(text)
        self.valid_inputs = [line_with_checksum(text) for text in self._texts]

    def mutated(self):
        random = self.random
        text = random.choice(self._texts)
        roll = random.random()
        if roll < 0.3:
            return damaged(random, line_with_checksum(text))
        if roll < 0.35:
            return line_with_checksum(json.dumps(random.choice(VALUES)).encode())
        return line_with_checksum(
            corrupt_json(random, text) if roll < 0.7 else damaged(random, text)
        )

    def read(self, content):
        try:
            return decode_line(content)
        except ValueError as error:  # callers of decode_line translate it
            raise FastvggError(str(self.path), "create it again") from error

    def check(self, content, result, error):
        line = content.endswith(b"\n") and content == line_with_checksum(content[17:-1])
        assert line == (result is not None or error is not None)
        assert result is None or isinstance(result, dict)


RECORDS = [
    ImageRecord(f"a/{row}.png", "a", 9, 7, row == 3, "torn" * (row == 3)) for row in range(5)
]


def make_commit(chunk, records):
    return Commit(chunk, *[f"{chunk:016x}"] * 2, records)


def plans(directory):
    """Return plans that depend on neither directory nor time, except for the target."""
    batch = pixels(5, height=1)  # so that true equals a valid size
    arrays, photos = save_npy(directory / "a.npy", batch), save_images(directory / "photos", batch)
    target = directory / "y.npy"
    own = fastvgg.Mode("own", divide=2.0, mean=(1.5, 2.0, 3.0), std=(0.5, 0.25, 1.0), order="BGR")
    new_plans = (
        plan_of(arrays, target, mode=own, dtype="float16", images_per_chunk=2),
        plan_of(photos, target, mode="torch", out_layout="NCHW", size=(1, 6), images_per_chunk=2),
        plan_of(
            photos, target, direction="pack", scale_to_uint8=True, exif=True, images_per_chunk=2
        ),
    )
    jobs = [
        dataclasses.replace(
            plan.job, source=f"/data/{Path(plan.source).name}", fingerprint=FINGERPRINT
        )
        for plan in new_plans
    ]
    return [
        dataclasses.replace(plan, job=job, chunk_images=2)
        for plan, job in zip(new_plans, jobs, strict=True)
    ]


def check_counts(*numbers):
    for number in numbers:
        assert type(number) is int
        assert number >= 1


def check_job(typed):
    """Check the numbers of an accepted job; return its number of images."""
    job = typed.to_dict()
    for part in ("source", "result"):
        check_counts(*job[part]["shape"])
        assert len(job[part]["shape"]) == 4
    check_counts(*(job["source"].get("size") or ()))
    source, transform = job["source"], fastvgg.Transform.from_dict(job["transform"])
    transform.check_input(source["shape"], source["dtype"])
    assert job["result"]["shape"] == list(transform.output_shape(tuple(source["shape"])))
    assert job["result"]["dtype"] == transform.output_type(source["dtype"])
    assert transform.layout == source["layout"]
    assert json.loads(json.dumps(transform.to_dict())) == job["transform"]
    assert source.get("interpolation", "nearest") in INTERPOLATIONS
    assert source.get("size") is None or len(source["size"]) == 2
    return job["result"]["shape"][0]


def consistent_changes(random, text):
    """Change several fields of a job consistently, so that they still agree."""
    fields = json.loads(text)
    source, transform, result = (fields["job"][part] for part in ("source", "transform", "result"))
    roll = random.choice([0, 0, 0, 1, 2, 3, 4, 5])
    if roll == 0:
        images = 2 ** random.choice([10, 20, 30, 34, 36, 47, 49])
        source["shape"][0] = result["shape"][0] = images
        fields["chunk_images"] = random.choice([1, 2, images, 2 * images])
        if "file_bytes" in fields:
            fields["file_bytes"] = 128 + images * 4 * math.prod(REDO_LOG_SHAPE[1:])
    elif roll == 1:
        shapes = ([5, 9, 3], [5, 1, 9, 4], [5, 3, 1, 9], [5, 1, 9, 3, 1], [5] * 4)
        source["shape"] = result["shape"] = random.choice(shapes)
    elif roll == 2:
        layout = random.choice(["NHWC", "NCHW", "NCWH"])
        transform["layout"] = transform["out_layout"] = result["layout"] = layout
    elif roll == 3:
        transform["dtype"], result["dtype"] = random.choice(
            [("<f4", "float32"), ("single", "float32"), ("f2", "float16"), (None, "uint8")]
        )
    elif roll == 4:
        part = random.choice(["mean", "std"])
        transform["mode"][part] = random.choice(
            ["123", [1, 2, 3], [True] * 3, [1.0] * 4, [0.0] * 3]
        )
    else:
        source["size"] = random.choice([[1], [1, 6, 3], [True, 6], [0, 6], [], "ab"])
        source["interpolation"] = random.choice(["nearest", "NEAREST", ""])
        source["scale_to_uint8"] = random.choice([True, False, 1, "scale"])
        source["max_pixels"] = random.choice([1, 0, -1, True, 2**70])
    return json.dumps(fields).encode()


class Journals(Kind):
    """Journals of runs into a new file."""

    name, share = "journals", 0.12
    error_type = ResumeError

    def __init__(self, directory, random):
        super().__init__(directory, random)
        self._plans = plans(directory)
        self.dataset = directory / "y.npy"
        self.path = directory / "y.npy.fastvgg-journal"
        self._file = self.reused(self.path)
        self.valid_inputs = []
        for plan, records in zip(self._plans, ([], RECORDS, RECORDS), strict=True):
            first = {"fastvgg-journal": 3, "job": plan.job.to_dict(), "chunk_images": 2}
            first |= {"replaces": None, "retries": bool(records)}
            commits = [
                make_commit(chunk, records[2 * chunk : 2 * chunk + 2])
                for chunk in range(plan.chunks)
            ]
            self.valid_inputs.append(
                encode_line(first) + b"".join(each.to_line() for each in commits)
            )

    def mutated(self):
        random = self.random
        intact = random.choice(self.valid_inputs)
        roll = random.random()
        if roll < 0.15:
            return damaged(random, intact)
        lines = intact.splitlines(keepends=True)
        at = random.choice([0, 0, *range(len(lines))])
        if roll < 0.2:
            lines[0] = line_with_checksum(consistent_changes(random, lines[0][17:-1]))
        elif roll < 0.8:
            lines[at] = line_with_checksum(corrupt_json(random, lines[at][17:-1]))
        elif roll < 0.9:
            lines[at] = line_with_checksum(damaged(random, lines[at][17:-1]))
        elif roll < 0.95:
            lines.insert(random.randrange(len(lines)), lines[at])
        else:
            del lines[at]
        return b"".join(lines)

    def read(self, content):
        self._file.put(content)
        journal_state = read_journal(self.path)
        if journal_state is not None:
            for plan in self._plans:
                with contextlib.suppress(FastvggError):
                    assert (
                        inspect_target(plan, make_destination(plan), journal_state).name
                        == "resumable"
                    )
                with contextlib.suppress(FastvggError):
                    with_committed(plan, journal_state.chunk_images, len(journal_state.commits))
        return journal_state

    def check(self, content, result, error):
        assert self._file.get() == content
        length = valid_prefix_bytes(content)
        if any(intact.startswith(content[:length]) for intact in self.valid_inputs):
            assert error is None
        if error is None:
            assert length == (0 if result is None else result.valid_bytes)
        if result is not None or len(content) % 8 == 0:
            check_info(self.dataset, expected=result is not None)
        if result is None:
            return
        images = check_job(result.job)
        check_counts(result.chunk_images)
        chunks = -(-images // result.chunk_images)
        assert result.complete == (len(result.commits) == chunks)
        for chunk, commit in result.commits.items():
            assert type(chunk) is int
            assert 0 <= chunk < chunks
            assert {type(commit.checksum), type(commit.source_checksum)} == {str}
            chunk_image_count = (
                min(images, (chunk + 1) * result.chunk_images) - chunk * result.chunk_images
            )
            intact = result.commit(chunk)
            assert (intact.chunk, intact.checksum) == (chunk, commit.checksum)
            assert len(intact.records) in (0, chunk_image_count)
            assert commit.failed == intact.failed == len(result.failures(chunk))


class Manifests(Kind):
    """Manifests of finished datasets."""

    name, share = "manifests", 0.08
    error_type = SourceError

    def __init__(self, directory, random):
        super().__init__(directory, random)
        self.dataset = directory / "y.npy"
        self.path = directory / "y.npy.fastvgg.json"
        self.valid_inputs = [
            Manifest(
                job=plan.job,
                chunk_images=2,
                checksums=[f"{chunk:016x}" for chunk in range(plan.chunks)],
                source_checksums=[""] * plan.chunks,
                index_checksum="",
                counts={"images": 5, "failed": failed},
                created="2026-01-01T00:00:00+00:00",
                packages={"python": "3.11.7", "fastvgg": "0.1.0"},
            ).to_json()
            for failed, plan in enumerate(plans(directory))
        ]
        self.dataset.touch()  # `info` refuses a manifest without data
        self._file = self.reused(self.path)

    def mutated(self):
        intact = self.random.choice(self.valid_inputs)
        roll = self.random.random()
        change = consistent_changes if roll < 0.05 else corrupt_json if roll < 0.7 else damaged
        return change(self.random, intact)

    def read(self, content):
        self._file.put(content)
        return read_manifest(self.dataset)

    def check(self, content, result, error):
        assert self._file.get() == content
        if result is not None or len(content) % 8 == 0:
            check_info(self.dataset, expected=result is not None)
        if result is None:
            assert error is not None
            return
        assert json.loads(result.to_json()) == json.loads(content)
        images = check_job(result.job)
        check_counts(result.chunk_images, result.counts["images"], result.counts["failed"] + 1)
        assert result.counts["images"] == images >= result.counts["failed"]
        chunks = -(-images // result.chunk_images)
        assert len(result.checksums) == len(result.source_checksums) == chunks
        texts = [*result.checksums, *result.source_checksums, *result.packages.values()]
        assert {type(text) for text in texts} <= {str}
        assert result.header.shape == tuple(
            result.job.transform.output_shape(result.job.header.shape)
        )
