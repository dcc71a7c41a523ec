"""What a finished dataset says about itself: `DST.fastvgg.json`, written last.

With it a dataset can be restored without being told the mode, verified years later, and told from
one that was never preprocessed.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import json
from dataclasses import dataclass
from importlib import metadata
from platform import python_version
from typing import TYPE_CHECKING, Any, Final

import xxhash

from fastvgg.datasets.base import Header, read_sidecar
from fastvgg.datasets.open import embedded_transform
from fastvgg.errors import SourceError
from fastvgg.storage.location import container_of, inner_name, sidecar_path
from fastvgg.stream.job import check_fields, check_job, check_sizes, transform_of_fields
from fastvgg.transform import Transform

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.datasets.base import Payload
    from fastvgg.stream.job import Schema

__all__ = [
    "Manifest",
    "checksum",
    "manifest_path",
    "package_versions",
    "read_manifest",
    "read_transform",
]

FORMAT: Final = 1
FIELDS: Final[Schema] = {
    "fastvgg-manifest": int,
    "job": dict,
    "chunk_images": int,
    "checksums": list,
    "source_checksums": list,
    "counts": dict,
    "created": str,
    "packages": dict,
}
COUNTS: Final[Schema] = {"images": int, "failed": int}


@dataclass(frozen=True)
class Manifest:
    """The manifest of a dataset."""

    job: dict[str, Any]
    """Source, transform and result, as `Plan.job` gives them."""
    chunk_images: int
    checksums: list[str]
    """xxh3-64 of every chunk's bytes."""
    source_checksums: list[str]
    """Of what identifies the images of each chunk that could be read; empty for an array's."""
    counts: dict[str, int]
    created: str
    packages: dict[str, str]

    @classmethod
    def of_now(
        cls,
        job: dict[str, Any],
        chunk_images: int,
        checksums: list[str],
        counts: dict[str, int],
        source_checksums: list[str] | None = None,
    ) -> Manifest:
        """Return the manifest of a dataset that was finished now, by these packages."""
        created = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        sources = source_checksums or [""] * len(checksums)
        return cls(job, chunk_images, checksums, sources, counts, created, package_versions())

    @property
    def dataset(self) -> str:
        """What it is called within its file; empty where it is a file itself."""
        return str(self.job["result"].get("dataset", ""))

    @property
    def transform(self) -> Transform:
        """What was done to the source."""
        return Transform.from_dict(self.job["transform"])

    @property
    def header(self) -> Header:
        """What the dataset holds."""
        result = self.job["result"]
        return Header(tuple(result["shape"]), result["dtype"], result["layout"])

    @property
    def source_header(self) -> Header:
        """What the source held."""
        source = self.job["source"]
        return Header(tuple(source["shape"]), source["dtype"], source["layout"])

    def to_json(self) -> bytes:
        """Return the manifest's file."""
        fields = {"fastvgg-manifest": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=1).encode() + b"\n"


def manifest_path(dataset: Path) -> Path:
    """Return where the manifest of a dataset is."""
    return sidecar_path(dataset, ".fastvgg.json")


def read_manifest(dataset: Path) -> Manifest | None:
    """Read the manifest of a dataset; None where it has none.

    Of a file of several datasets it describes the one that was written with it.

    Raises
    ------
    SourceError
        If the manifest is damaged, or of a format that this version does not know.
    """
    path = manifest_path(dataset)
    data = read_sidecar(path)
    if data is None:
        return None
    try:
        fields = json.loads(data)
        _check_format(path, fields)
        manifest = _checked(fields)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} is not a manifest: {type(error).__name__}: {str(error)[:200]}",
            "put back the manifest that was written with the dataset, or remove it and say what "
            "the dataset is: --mode, --layout",
        ) from None
    asked = inner_name(dataset)
    return manifest if asked in ("", manifest.dataset) or not manifest.dataset else None


def describes_other_dataset(dataset: Path) -> bool:
    """Whether what lies beside an HDF5 file is of another dataset in it.

    Raises
    ------
    SourceError
        If the manifest is damaged.
    """
    if not inner_name(dataset):
        return False
    return read_manifest(dataset) is None and read_manifest(container_of(dataset)) is not None


def read_transform(dataset: Path) -> Transform | None:
    """Return what was done to a dataset, by its manifest or its own attributes; None if unknown.

    Raises
    ------
    SourceError
        If what says so is damaged.
    """
    manifest = read_manifest(dataset)
    if manifest is not None:
        return manifest.transform
    said = embedded_transform(dataset)
    if said is None:
        return None
    try:
        return transform_of_fields(said)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{dataset} says of itself what is no transform: {str(error)[:200]}",
            "put back what was written, or remove the attribute 'fastvgg' and say what the dataset "
            "is: --mode, --layout",
        ) from None


def _check_format(path: Path, fields: object) -> None:
    found = fields.get("fastvgg-manifest") if isinstance(fields, dict) else None
    if type(found) is int and found != FORMAT:
        raise SourceError(
            f"{path} has format {str(found)[:20]}, and this version reads {FORMAT}",
            "use the version of fastvgg that wrote it, or a newer one",
        )


def _checked(fields: dict[str, Any]) -> Manifest:
    """Return a manifest whose parts are what they should be, and fit together.

    Raises
    ------
    ValueError
        If they are not.
    """
    check_fields(fields, FIELDS)
    check_job(fields["job"])
    check_fields(fields["counts"], COUNTS)
    manifest = Manifest(**{name: fields[name] for name in FIELDS if name != "fastvgg-manifest"})
    images, counts = manifest.header.images, manifest.counts
    check_sizes([manifest.chunk_images])
    check_sizes([counts["images"]], minimum=images, maximum=images)
    check_sizes([counts["failed"]], minimum=0, maximum=images)
    sums = manifest.checksums, manifest.source_checksums
    if any(len(of_chunks) != -(-images // manifest.chunk_images) for of_chunks in sums):
        raise ValueError(f"{len(manifest.checksums)} checksums of {images} images")
    texts = [*manifest.checksums, *manifest.source_checksums, *manifest.packages.values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a checksum or a version is no text")
    return manifest


def package_versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    names = ("fastvgg", "numpy", "numba", "pillow", "simplejpeg", "h5py", "zarr")
    return {"python": python_version(), **{name: _version_of(name) for name in names}}


@functools.cache  # to read what is installed takes a millisecond a package
def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def checksum(stored: Payload) -> str:
    """Return the xxh3-64 of what is stored of some images."""
    digest = xxhash.xxh3_64()
    for piece in stored:
        digest.update(piece)
    return digest.hexdigest()
