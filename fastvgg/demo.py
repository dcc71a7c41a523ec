"""An end-to-end demo on real photographs: preprocess, restore, compare, draw a contact sheet."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from fastvgg.datasets.index import read_index
from fastvgg.datasets.open import open_source
from fastvgg.errors import BackendError, TargetError, VerificationError, command
from fastvgg.imaging.decode import DecodeOptions
from fastvgg.storage.local import Storage
from fastvgg.storage.location import Location
from fastvgg.stream.manifest import read_manifest
from fastvgg.stream.planner import plan
from fastvgg.stream.preflight import SIDECARS
from fastvgg.stream.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

SIZE: Final = (224, 224)
MARGIN: Final = 8
CAPTION_HEIGHT: Final = 18
COLUMNS: Final = ("original", "network input", "restored", "difference")

# File in scikit-image -> path to write: JPEG and PNG, one of them grayscale, in class folders.
PHOTOGRAPHS: Final = {
    "rocket.jpg": "rocket/rocket.jpg",
    "coffee.png": "food/coffee.jpg",
    "chelsea.png": "cat/chelsea.png",
    "astronaut.png": "people/astronaut.jpg",
    "camera.png": "people/camera.png",
}
SHEET_NAME: Final = "contact-sheet.png"
SHEET_SOFTWARE: Final = "fastvgg demo"  # in its metadata, proves that a sheet is one of a demo


class DemoResult(NamedTuple):
    """The results of the demo."""

    images: int
    compared_bytes: int
    contact_sheet: Path


def run_demo(directory: Path, echo: Callable[[str], None]) -> DemoResult:
    """Run the demo in a new directory, or in that of an earlier demo.

    Parameters
    ----------
    directory
        Created if it is missing. It must be empty or contain only an earlier demo.
    echo
        Called with one line of output for each step.

    Raises
    ------
    TargetError
        If the directory contains other files.
    BackendError
        If scikit-image, which provides the photographs, is not installed.
    VerificationError
        If any restored byte differs.
    """
    photographs, stored = directory / "photos", directory / "train.npy"
    restored, sheet = directory / "restored", directory / SHEET_NAME
    contents = _photographs()
    _check_directory(directory, contents)
    _write_photographs(photographs, contents)
    echo(
        f"{photographs}: {len(PHOTOGRAPHS)} photographs of different sizes, JPEG, PNG and grayscale"
    )
    echo(str(plan(photographs, stored, mode="caffe", size=SIZE, restart=True).run()))
    echo(str(verify(stored, full=True)))
    echo(str(plan(stored, restored, direction="restore", restart=True).run()))
    originals, results = _read_images(photographs), _read_images(restored)
    differing = int((originals != results).sum())
    names = [record.path for record in read_index(stored, len(PHOTOGRAPHS))]
    _draw(sheet, originals, np.load(stored), results, names)
    echo(f"{sheet}: {', '.join(COLUMNS)}")
    if differing:
        raise VerificationError(
            f"{differing} of {originals.nbytes} restored bytes differ from the originals",
            f"this is a bug in fastvgg: report it with the output of {command('info', stored)}",
        )
    return DemoResult(len(originals), originals.nbytes, sheet)


def _check_directory(directory: Path, photographs: dict[str, bytes]) -> None:
    """Check that a directory is missing, empty, or contains only an earlier demo.

    A dataset belongs to an earlier demo if it has a manifest; `plan` replaces no other datasets.
    """
    remedy = "give a new directory"
    if directory.exists() and not directory.is_dir():
        raise TargetError(f"{directory} is not a directory", remedy)
    demo_paths = {f"photos/{path}" for path in photographs} | {SHEET_NAME}
    for dataset in ("train.npy", "restored"):
        if (directory / dataset).exists() and read_manifest(directory / dataset) is not None:
            demo_paths.add(dataset)
        demo_paths.update(dataset + suffix for suffix in SIDECARS)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        ancestors = {str(parent) for parent in (name, *name.parents)}
        is_demo_folder = path.is_dir() and any(known.startswith(f"{name}/") for known in demo_paths)
        if path.is_symlink() or (ancestors.isdisjoint(demo_paths) and not is_demo_folder):
            raise TargetError(f"{directory} contains other files, such as {name}", remedy)
    for photograph, content in photographs.items():
        path = directory / "photos" / photograph
        if path.exists() and not (path.is_file() and path.read_bytes() == content):
            raise TargetError(f"{path} is another photograph than that of the demo", remedy)
    sheet = directory / SHEET_NAME
    if sheet.exists() and not _is_contact_sheet(sheet):
        raise TargetError(f"{sheet} is not the contact sheet of an earlier demo", remedy)


def _is_contact_sheet(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == SHEET_SOFTWARE
    except OSError:
        return False


def _photographs() -> dict[str, bytes]:
    """Return the photographs, encoded, by their paths."""
    try:
        import skimage
    except ImportError:
        raise BackendError(
            "scikit-image, which provides the photographs, is not installed",
            "in a clone of fastvgg: pip install '.[demo]'",
        ) from None
    contents = {}
    for name, relative in PHOTOGRAPHS.items():
        source = Path(skimage.__file__).parent / "data" / name
        if source.suffix == Path(relative).suffix:
            contents[relative] = source.read_bytes()
            continue
        encoded = io.BytesIO()
        with Image.open(source) as image:
            image.save(encoded, "JPEG", quality=92)
        contents[relative] = encoded.getvalue()
    return contents


def _write_photographs(directory: Path, contents: dict[str, bytes]) -> None:
    """Write the photographs that are missing."""
    storage = Storage()
    for name, content in contents.items():
        path = directory / name
        if not path.exists():
            storage.make_directory(path.parent)
            storage.write_file(path, [content], exclusive=True)


def _read_images(directory: Path) -> NDArray[np.uint8]:
    source = open_source(Location(directory), decoding=DecodeOptions(SIZE))
    with contextlib.closing(source):
        return source.read(0, source.header.images).batch


def _draw(
    path: Path,
    originals: NDArray[np.uint8],
    inputs: NDArray[Any],
    restored: NDArray[np.uint8],
    names: list[str],
) -> None:
    """Draw a contact sheet with one row per photograph and a column for each of `COLUMNS`."""
    height, width = SIZE
    cell_width, cell_height = width + MARGIN, height + MARGIN + CAPTION_HEIGHT
    size = (MARGIN + len(COLUMNS) * cell_width, MARGIN + len(names) * cell_height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        difference = originals[row] != restored[row]
        pictures = (
            originals[row],
            _to_visible(inputs[row]),
            restored[row],
            np.where(difference, 255, 0).astype(np.uint8),
        )
        captions = (name, *COLUMNS[1:3], f"{int(difference.sum())} of {difference.size} differ")
        for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            left, top = MARGIN + column * cell_width, MARGIN + row * cell_height
            draw.text((left, top), caption, fill="black")
            sheet.paste(Image.fromarray(picture), (left, top + CAPTION_HEIGHT))
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("Software", SHEET_SOFTWARE)
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG", pnginfo=metadata)
    Storage().replace_file(path, [encoded.getvalue()])


def _to_visible(network_input: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale a network input to 0..255 for display, without reversing its BGR channels."""
    low, high = float(network_input.min()), float(network_input.max())
    stretched = (network_input - low) * (255.0 / max(high - low, 1e-6))
    return np.asarray(stretched.astype(np.uint8))
