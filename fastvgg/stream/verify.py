"""Verify a finished dataset: check all checksums, and recompute images with the oracle."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from fastvgg import oracle
from fastvgg.datasets.image_writer import is_lossy
from fastvgg.datasets.index import read_index
from fastvgg.datasets.open import open_source, open_target
from fastvgg.errors import SourceError, VerificationError
from fastvgg.storage.location import Location
from fastvgg.stream.manifest import Provenance, checksum
from fastvgg.stream.redo_log import check_not_in_place
from fastvgg.stream.source import check_exists

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from fastvgg.datasets.base import ImageRecord, Source, Target
    from fastvgg.stream.manifest import Manifest

SAMPLED_IMAGES: Final = 16


@dataclass(frozen=True)
class Verification:
    """The result of a successful verification."""

    path: str
    images: int
    chunks: int
    """Chunks whose checksums match: all of them."""
    recomputed_images: int
    """Images whose bytes equal those recomputed from the source."""
    note: str
    """Why the source was not compared; empty if it was."""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.path}: {self.images} images in {self.chunks} chunks match their checksums, "
            f"{self.recomputed_images} images match the NumPy reference{note}"
        )


def verify(path: str | os.PathLike[str], *, full: bool = False) -> Verification:
    """Verify a dataset that fastvgg wrote.

    Parameters
    ----------
    path
        The dataset; its manifest must be next to it.
    full
        Recompute every image from the source instead of a sample of 16.

    Raises
    ------
    VerificationError
        If stored bytes do not match their checksum or the bytes recomputed from the source.
    SourceError
        If there is no manifest, or the dataset cannot be read.
    """
    location = Location.parse(path)
    check_not_in_place(location.container)
    check_exists(location)
    manifest = Provenance.read(location).manifest
    if manifest is None:
        raise SourceError(
            f"{location} has no manifest, so there are no checksums to compare with",
            "give a dataset that fastvgg has finished; 'fastvgg info' shows what this is",
        )
    location = location.with_inner(manifest.job.dataset)
    records = read_index(location.container, manifest.header.images)
    stored = open_target(
        location,
        manifest.header,
        chunk_images=manifest.chunk_images,
        records=records,
        file_format=manifest.job.file_format,
    )
    _check_checksums(stored, manifest)
    recomputed, note = _check_against_oracle(stored, manifest, records, full=full)
    images, chunks = manifest.header.images, len(manifest.checksums)
    return Verification(str(location), images, chunks, recomputed, note)


def _check_checksums(stored: Target, manifest: Manifest) -> None:
    images, chunk_images = manifest.header.images, manifest.chunk_images
    for chunk, expected in enumerate(manifest.checksums):
        start, stop = chunk * chunk_images, min((chunk + 1) * chunk_images, images)
        actual = checksum(stored.read_stored(start, stop))
        if actual != expected:
            raise VerificationError(
                f"{stored.path}: images {start} to {stop - 1} have checksum {actual}, expected "
                f"{expected}",
                "the file was changed or damaged: recreate it from its source",
            )


def _check_against_oracle(
    stored: Target, manifest: Manifest, records: Sequence[ImageRecord], *, full: bool
) -> tuple[int, str]:
    """Recompute images from the source; return how many, and a note if it was not compared."""
    job = manifest.job
    if job.in_place:
        return 0, "not compared with the source, which was overwritten in place"
    if is_lossy(job.file_format):
        return 0, "not compared with the source: JPEG is lossy"
    try:
        source = open_source(
            Location.parse(job.source),
            layout=job.header.layout,
            dtype_hint=job.header.dtype,
            decoding=job.decoding,
            use_index=False,
            follow_links=job.follow_links,
        )
    except SourceError as error:
        return 0, f"not compared with the source: {error.problem}"
    images = manifest.header.images
    rows: Sequence[int] = range(images)
    if not full and images > SAMPLED_IMAGES:  # a sample at equal distances
        rows = [image * (images - 1) // (SAMPLED_IMAGES - 1) for image in range(SAMPLED_IMAGES)]
    with contextlib.closing(source):
        # A copy of the source has another modification time and so another fingerprint, but the
        # same pixels: `full` compares them anyway.
        is_same = full or source.fingerprint() == job.fingerprint
        if source.header != job.header or not is_same:
            return 0, f"not compared with the source: {source.location} has changed"
        for row in rows:
            _check_row(stored, source, manifest, records, row)
    return len(rows), ""


def _check_row(
    stored: Target, source: Source, manifest: Manifest, records: Sequence[ImageRecord], row: int
) -> None:
    read = source.read(row, row + 1)
    expected = oracle.apply(manifest.job.transform, read.batch)
    if records and records[row].failed:
        expected = np.zeros_like(expected)
    actual = stored.read_back(row, row + 1)
    differing = int((actual.view(np.uint8) != expected.view(np.uint8)).sum())
    if differing:
        raise VerificationError(
            f"{stored.path}: image {row} differs in {differing} of {expected.nbytes} bytes from "
            f"the result recomputed from {source.location}",
            "the source or the dataset was changed: recreate the dataset from its source",
        )
