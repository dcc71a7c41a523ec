"""The whole way on real photographs: write them, preprocess, restore, prove equality, draw it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from fastvgg.datasets.index import read_index
from fastvgg.datasets.open import open_source
from fastvgg.errors import BackendError, TargetError, VerificationError
from fastvgg.imaging.decode import DecodeOptions
from fastvgg.stream.manifest import read_manifest
from fastvgg.stream.planner import SIDECARS, plan
from fastvgg.stream.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["Demonstration", "demonstrate"]

SIZE: Final = (224, 224)
MARGIN: Final = 8
CAPTION_HEIGHT: Final = 18
COLUMNS: Final = ("original", "network input", "restored", "difference")

# File in scikit-image -> path to write: JPEG and PNG, one of them grey, some in class folders.
PHOTOGRAPHS: Final = {
    "rocket.jpg": "rocket.jpg",
    "coffee.png": "coffee.jpg",
    "chelsea.png": "cat/chelsea.png",
    "astronaut.png": "people/astronaut.jpg",
    "camera.png": "people/camera.png",
}


class Demonstration(NamedTuple):
    """What the demo showed."""

    images: int
    compared_bytes: int
    differing_bytes: int
    contact_sheet: Path


def demonstrate(directory: Path, say: Callable[[str], None]) -> Demonstration:
    """Run the demo in a directory of its own.

    Parameters
    ----------
    directory
        Made if it is missing; one that holds anything but an earlier demo is refused.
    say
        Called with a line about each step.

    Raises
    ------
    TargetError
        If the directory holds other things.
    BackendError
        If scikit-image, which brings the photographs, is not installed.
    VerificationError
        If a single byte comes back different.
    """
    photographs, stored = directory / "photos", directory / "train.npy"
    restored, sheet = directory / "restored", directory / "contact-sheet.png"
    _check_directory(directory)
    _write_photographs(photographs)
    say(f"{photographs}: {len(PHOTOGRAPHS)} photographs of different sizes, JPEG, PNG and grey")
    report = plan(photographs, stored, mode="caffe", size=SIZE, restart=True).run()
    say(str(report))
    say(str(verify(stored, full=True)))
    report = plan(stored, restored, direction="restore", restart=True).run()
    say(str(report))
    originals, returned = _images(photographs), _images(restored)
    differing = int((originals != returned).sum())
    _draw(sheet, originals, np.load(stored, mmap_mode="r"), returned, _names(stored))
    say(f"{sheet}: {', '.join(COLUMNS)}")
    if differing:
        raise VerificationError(
            f"{differing} of {originals.nbytes} bytes came back different",
            "this is a defect: please report it with your versions ('fastvgg info' on train.npy)",
        )
    return Demonstration(len(originals), originals.nbytes, differing, sheet)


def _check_directory(directory: Path) -> None:
    """Refuse a directory that holds anything but an earlier demo.

    The datasets of an earlier demo are known by their manifests: `plan` replaces no others.
    """
    if directory.exists() and not directory.is_dir():
        raise TargetError(f"{directory} is a file", "give a new directory: fastvgg demo demo/")
    of_a_demo = {f"photos/{path}" for path in PHOTOGRAPHS.values()} | {"contact-sheet.png"}
    for dataset in ("train.npy", "restored"):
        if (directory / dataset).exists() and read_manifest(directory / dataset) is not None:
            of_a_demo.add(dataset)
        of_a_demo.update(dataset + beside for beside in SIDECARS)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        around = {str(parent) for parent in (name, *name.parents)}
        folder = any(known.startswith(f"{name}/") for known in of_a_demo)
        if around.isdisjoint(of_a_demo) and not (folder and path.is_dir()):
            raise TargetError(
                f"{directory} holds other things, {name} among them",
                "give a new directory: fastvgg demo demo/",
            )


def _write_photographs(directory: Path) -> None:
    try:
        import skimage
    except ImportError:
        raise BackendError(
            "scikit-image, which brings the photographs, is not installed",
            "pip install 'fastvgg[demo]'",
        ) from None
    for name, relative in PHOTOGRAPHS.items():
        source, path = Path(skimage.__file__).parent / "data" / name, directory / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == path.suffix:
            shutil.copyfile(source, path)
        else:
            with Image.open(source) as image:
                image.save(path, quality=92)


def _images(directory: Path) -> NDArray[np.uint8]:
    source = open_source(directory, decoding=DecodeOptions(SIZE))
    try:
        return source.read(0, source.header.images).batch
    finally:
        source.close()


def _names(stored: Path) -> list[str]:
    return [record.path for record in read_index(stored, len(PHOTOGRAPHS))]


def _draw(
    path: Path,
    originals: NDArray[np.uint8],
    inputs: NDArray[Any],
    restored: NDArray[np.uint8],
    names: list[str],
) -> None:
    """Draw one row for each photograph: original, network input, restored, difference."""
    height, width = SIZE
    cell_width, cell_height = width + MARGIN, height + MARGIN + CAPTION_HEIGHT
    size = (MARGIN + len(COLUMNS) * cell_width, MARGIN + len(names) * cell_height)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        difference = originals[row] != restored[row]
        pictures = (
            originals[row],
            _visible(inputs[row]),
            restored[row],
            np.where(difference, 255, 0).astype(np.uint8),
        )
        captions = (name, *COLUMNS[1:3], f"{int(difference.sum())} of {difference.size} differ")
        for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            left, top = MARGIN + column * cell_width, MARGIN + row * cell_height
            pen.text((left, top), caption, fill="black")
            sheet.paste(Image.fromarray(picture), (left, top + CAPTION_HEIGHT))
    sheet.save(path)


def _visible(network_input: NDArray[Any]) -> NDArray[np.uint8]:
    """Stretch a network input to 0..255; its channels are shown as they lie, B where R is."""
    low, high = float(network_input.min()), float(network_input.max())
    stretched = (network_input - low) * (255.0 / max(high - low, 1e-6))
    return np.asarray(stretched.astype(np.uint8))
