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

from fastvgg.datasets.base import Header
from fastvgg.errors import SourceError
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
    try:
        fields = json.loads(path.read_bytes())
        found = fields.pop("fastvgg-manifest")
        if found != FORMAT:
            raise SourceError(
                f"{path} has format {found!r}, and this version reads {FORMAT}",
                "use the version of fastvgg that wrote it, or a newer one",
            )
        manifest = Manifest(**fields)
        _ = manifest.transform, manifest.header, manifest.source_header
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{path} is not a manifest: {type(error).__name__}: {error}",
            "put back the manifest that was written with the dataset, or remove it and say what "
            "the dataset is: --mode, --layout",
        ) from None
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
