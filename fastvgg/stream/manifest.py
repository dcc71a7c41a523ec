"""What a finished dataset says about itself: `DST.fastvgg.json`, written last.

With it a dataset can be restored without being told the mode, verified years later, and told from
one that was never preprocessed.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib import metadata
from platform import python_version
from typing import TYPE_CHECKING, Any, Final

from fastvgg import datasets
from fastvgg.datasets.base import Header, read_beside
from fastvgg.errors import SourceError
from fastvgg.stream.plan import result_header
from fastvgg.transform import Transform

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Manifest", "manifest_path", "package_versions", "read_manifest"]

FORMAT: Final = 1


@dataclass(frozen=True)
class Manifest:
    """The manifest of a dataset."""

    job: dict[str, Any]
    """Source, transform and result, as `Plan.job` gives them."""
    chunk_images: int
    checksums: list[str]
    """xxh3-64 of every chunk's bytes."""
    counts: dict[str, int]
    created: str
    packages: dict[str, str]

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
    return dataset.with_name(dataset.name + ".fastvgg.json")


def read_manifest(dataset: Path) -> Manifest | None:
    """Read the manifest of a dataset; None where it has none.

    Raises
    ------
    SourceError
        If the manifest is damaged, or of a format that this version does not know.
    """
    path = manifest_path(dataset)
    data = read_beside(path)
    if data is None:
        return None
    try:
        fields = json.loads(data)
        found = fields.pop("fastvgg-manifest")
        if found != FORMAT:
            raise SourceError(
                f"{path} has format {found!r}, and this version reads {FORMAT}",
                "use the version of fastvgg that wrote it, or a newer one",
            )
        return _checked(Manifest(**fields))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{path} is not a manifest: {type(error).__name__}: {str(error)[:200]}",
            "put back the manifest that was written with the dataset, or remove it and say what "
            "the dataset is: --mode, --layout",
        ) from None


def _checked(manifest: Manifest) -> Manifest:
    """Return a manifest whose parts are what they should be, and fit together.

    Raises
    ------
    ValueError, KeyError, TypeError
        If they are not.
    """
    source = manifest.job["source"]
    wrong = [
        name
        for name, value, kind in (
            ("the source's path", source["path"], str),
            ("the source's kind", source["kind"], str),
            ("the source's fingerprint", source["fingerprint"], str),
            ("the result's kind", manifest.job["result"]["kind"], str),
            ("created", manifest.created, str),
            ("packages", manifest.packages, dict),
            ("counts", manifest.counts, dict),
            ("checksums", manifest.checksums, list),
        )
        if not isinstance(value, kind)
    ]
    header, source_header = manifest.header, manifest.source_header
    if header != result_header(source_header, manifest.transform):
        wrong.append("the result's header")
    sizes = [*header.shape, manifest.chunk_images, *(source.get("size") or ())]
    sizes += [manifest.counts["images"], manifest.counts["failed"] + 1]
    if any(type(size) is not int or size < 1 for size in sizes) or len(header.shape) != 4:
        wrong.append("a size")
    elif len(manifest.checksums) != -(-header.images // manifest.chunk_images):
        wrong.append(f"{len(manifest.checksums)} checksums of {header.images} images")
    if source["kind"] == "images" and source["interpolation"] not in datasets.INTERPOLATIONS:
        wrong.append("the interpolation")
    if wrong:
        raise ValueError(", ".join(wrong))
    return manifest


def package_versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    versions = {"python": python_version()}
    for name in ("fastvgg", "numpy", "numba", "pillow"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
