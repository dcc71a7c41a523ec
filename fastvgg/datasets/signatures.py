"""What a file contains, by its first bytes, whatever its name is.

A file that no format reads is described, with the command that turns it into one that is read.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING, Final, NamedTuple

from fastvgg.datasets.files import open_regular, read_at
from fastvgg.errors import SourceError
from fastvgg.imaging.formats import is_image

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.storage.location import Location

NPY_SIGNATURE: Final = b"\x93NUMPY"
HDF5_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
MIN_USER_BLOCK_BYTES: Final = 512  # HDF5 may begin there, or at any doubling of it
ZIP_SIGNATURES: Final = (b"PK\x03\x04", b"PK\x05\x06")
HEAD_BYTES: Final = 4096
MAX_NAME_BYTES: Final = 256  # of the first entry of a zip, for the rules below

UNPACK: Final = "unpack it, and give the directory with the images"
DIRECTORY: Final = "give the directory that contains the images"
STORE: Final = "store the images as files in a directory, or as an array in a .npy, and give that"


class Description(NamedTuple):
    """A format that is not read, and what to do with a file of it."""

    what: str
    remedy: str
    """`{file}` stands for the path, quoted for a shell, `{name}` for it as a Python string."""


SINGLE_IMAGE: Final = Description("a single image", "give the directory that contains it")
COMPRESSED: Final = Description("a compressed file", "decompress it, and give the result")
VIDEO: Final = Description(
    "a video",
    "extract its frames, and give FRAMES: mkdir FRAMES && ffmpeg -i {file} FRAMES/%06d.png",
)
TEXT: Final = Description("text, not images", DIRECTORY)
PYTORCH: Final = Description(
    "a file of PyTorch",
    "store its tensor as a .npy: numpy.save('new.npy', torch.load({name}, weights_only=True)"
    ".numpy())",
)
PICKLE: Final = Description(
    "a Python pickle, which is never loaded", "store the array with numpy.save, and give the .npy"
)
ZIP: Final = Description("a zip archive", UNPACK)
# By the suffix of a zip, or the name of its first entry.
ZIPS: Final = (
    (
        ".npz",
        re.compile(r"\.npy$"),
        Description(
            "a .npz, a zip of arrays",
            "store one of them as a .npy: numpy.save('new.npy', numpy.load({name})['NAME'])",
        ),
    ),
    ((".pt", ".pth"), re.compile(r"(^|/)(data\.pkl$|\.format_version$|\.data/)"), PYTORCH),
    (
        ".zarr.zip",
        re.compile(r"(^|/)(zarr\.json|\.zarray|\.zgroup|\.zattrs)$|^c/0|^0[./]0"),
        Description(
            "a zipped Zarr array", "unpack it, and give the directory: unzip {file} -d NEW.zarr"
        ),
    ),
    (".keras", re.compile("(?!)"), Description("a Keras model, not images", DIRECTORY)),
)
# The first bytes, as a regular expression, and what they mean; the first match counts.
SIGNATURES: Final = tuple(
    (re.compile(start, re.DOTALL), description)
    for start, description in (
        (rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3|\0\0\x01[\xb3\xba]", VIDEO),
        (rb"PAR1", Description("a Parquet file", STORE)),
        (rb"ARROW1|FEA1", Description("an Arrow file", STORE)),
        (
            rb".{3}[\0-\x0f]\0\0\0\0\{\s*\"",
            Description(
                "a safetensors file",
                "store its tensor as a .npy: numpy.save('new.npy', "
                "safetensors.numpy.load_file({name})['NAME'])",
            ),
        ),
        (
            rb"MATLAB 5",
            Description(
                "a MATLAB file older than version 7.3, which is not HDF5",
                "in MATLAB, save(..., '-v7.3'); or store its array as a .npy: numpy.save("
                "'new.npy', scipy.io.loadmat({name})['NAME'])",
            ),
        ),
        (
            rb"CDF[\x01\x02\x05]",
            Description(
                "a NetCDF 3 file, which is not HDF5", "convert it: nccopy -k nc4 {file} NEW.nc"
            ),
        ),
        (
            rb"\x0e\x03\x13\x01",
            Description("an HDF4 file, which is not HDF5", "convert it: h4toh5 {file} NEW.h5"),
        ),
        (rb"\x80\x02\x8a\x0al\xfc\x9cF", PYTORCH),
        (rb"\x80[\x02-\x05]", PICKLE),
        (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18", COMPRESSED),
        (
            rb"7z\xbc\xaf\x27\x1c|Rar!",
            Description("an archive", UNPACK),
        ),
        (
            rb".{257}ustar",
            Description("a tar", "give it a name that ends in .tar: mv {file} NEW.tar"),
        ),
        (rb"SQLite format 3", Description("a SQLite database", STORE)),
        (rb"%PDF", Description("a PDF document", STORE)),
    )
)
TEXT_SUFFIXES: Final = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".lst", ".yaml", ".yml", ".xml")
PRINTABLE_TEXT: Final = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]+")


def array_format(path: Path) -> str | None:
    """Return the format of a file that contains an array, "npy" or "hdf5"; None for all else."""
    try:
        with open_regular(path) as file:
            descriptor = file.fileno()
            if read_at(descriptor, len(NPY_SIGNATURE), 0) == NPY_SIGNATURE:
                return "npy"
            return "hdf5" if _has_hdf5_signature(descriptor) else None
    except OSError:
        return None


def _has_hdf5_signature(descriptor: int) -> bool:
    """Whether the superblock of HDF5 is at the start of a file or behind a user block."""
    length, offset = os.fstat(descriptor).st_size, 0
    while offset < length:
        if read_at(descriptor, len(HDF5_SIGNATURE), offset) == HDF5_SIGNATURE:
            return True
        offset = 2 * offset or MIN_USER_BLOCK_BYTES
    return False


def check_not_foreign(location: Location) -> None:
    """Check that a file is of no known format that is not read.

    Raises
    ------
    SourceError
        If it is one, says what it is and what to do, or if it cannot be read.
    """
    path = location.container
    try:
        with open_regular(path) as file:
            head = read_at(file.fileno(), HEAD_BYTES, 0)
    except OSError as error:
        raise SourceError(
            f"{path} cannot be opened: {error.strerror or error}",
            "check its path and permissions",
        ) from None
    found = _describe(path, head)
    if found is not None:
        remedy = found.remedy.replace("{file}", shlex.quote(str(path)))
        raise SourceError(
            f"{path} is {found.what}", remedy.replace("{name}", ascii(os.fspath(path)))
        )


def _describe(path: Path, head: bytes) -> Description | None:
    if head.startswith(ZIP_SIGNATURES):
        length = int.from_bytes(head[26:28], "little")
        first = os.fsdecode(head[30 : 30 + min(length, MAX_NAME_BYTES)])
        for suffix, entry, description in ZIPS:
            if path.name.lower().endswith(suffix) or entry.search(first):
                return description
        return ZIP
    if is_image(head):
        return SINGLE_IMAGE
    for start, description in SIGNATURES:
        if start.match(head):
            return description
    if path.suffix.lower() in TEXT_SUFFIXES and PRINTABLE_TEXT.fullmatch(head):
        return TEXT
    return None
