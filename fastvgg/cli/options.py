"""What the verbs take: arguments and options, with what their help says."""

from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer

from fastvgg import models

MODES: Final = ("caffe", "tf", "torch", "identity")
LAYOUTS: Final = ("NHWC", "NCHW")
INPUT_TYPES: Final = ("float16", "bfloat16", "float32", "float64")
RESTORED_TYPES: Final = ("uint8", *INPUT_TYPES)
INTERPOLATIONS: Final = ("nearest", "bilinear", "bicubic", "hamming", "box", "lanczos")
ROUNDINGS: Final = ("nearest", "truncate")
FORMATS: Final = ("png", "webp", "jpeg")
GRAY16_POLICIES: Final = ("error", "scale")


def _choice_option(
    values: Sequence[str], flag: str, metavar: str, about: str, default: str | bool = True
) -> Any:  # noqa: ANN401  # as Typer has it
    """Return an option whose values shells complete; the library refuses others, and says why."""
    return typer.Option(
        flag,
        metavar=metavar,
        help=about.format(values=f"{', '.join(values[:-1])} or {values[-1]}"),
        show_default=default,
        autocompletion=lambda: list(values),
    )


# As texts, for a Path would make one slash of the two of a URL.
Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A directory or tar shards of images; a .npy, a .zarr (also s3://), FILE.h5::/NAME, "
        "or a directory of part-*.npy.",
    ),
]
StoredSource = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A .npy, a .zarr (also s3://), FILE.h5::/NAME, or a directory of part-*.npy.",
    ),
]
Target = Annotated[
    str | None,
    typer.Argument(
        metavar="DST", help="What to write: a .npy, a .zarr (also s3://), FILE.h5::/NAME."
    ),
]
RestoredTarget = Annotated[
    str | None,
    typer.Argument(
        metavar="DST",
        help="What to write: a directory for image files, a .npy, a .zarr (also s3://), "
        "FILE.h5::/NAME.",
    ),
]

ModeName = Annotated[str | None, _choice_option(MODES, "--mode", "MODE", "{values}.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A published model instead of a mode: 'fastvgg models' lists them.",
        autocompletion=lambda: list(models.MODES_BY_MODEL),
    ),
]
Dtype = Annotated[
    str | None,
    _choice_option(INPUT_TYPES, "--dtype", "TYPE", "Of DST: {values}.", "float32 for uint8"),
]
RestoredDtype = Annotated[
    str | None, _choice_option(RESTORED_TYPES, "--dtype", "TYPE", "Of DST: {values}.", "uint8")
]
Rounding = Annotated[
    str, _choice_option(ROUNDINGS, "--rounding", "HOW", "To whole numbers: {values}.")
]
SourceLayout = Annotated[
    str | None, _choice_option(LAYOUTS, "--layout", "LAYOUT", "Of SRC: {values}.")
]
OutLayout = Annotated[
    str | None,
    _choice_option(LAYOUTS, "--out-layout", "LAYOUT", "Of DST: {values}.", "that of SRC"),
]

Size = Annotated[
    tuple[int, int] | None,
    typer.Option(metavar="H W", help="Resize images to this height and width."),
]
Interpolation = Annotated[
    str, _choice_option(INTERPOLATIONS, "--interpolation", "HOW", "To resize by: {values}.")
]
KeepAspectRatio = Annotated[
    bool, typer.Option("--keep-aspect-ratio", help="Cut out the wanted shape before resizing.")
]
FastJpeg = Annotated[
    bool, typer.Option("--fast-jpeg", help="Decode large JPEGs smaller: other pixels than Keras'.")
]
Exif = Annotated[bool, typer.Option("--exif", help="Turn images as EXIF says; Keras does not.")]
Gray16 = Annotated[
    str,
    _choice_option(
        GRAY16_POLICIES, "--gray16", "POLICY", "16-bit grayscale images: {values} to 8 bits."
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(metavar="N", help="Refuse larger images.", show_default="89478485"),
]
Format = Annotated[
    str,
    _choice_option(FORMATS, "--format", "FORMAT", "Of image files: {values}; jpeg is not exact."),
]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin again; replace an existing DST.")]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Try again what failed in a finished DST.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Make a .npy its own result: no DST.")]
Memory = Annotated[str, typer.Option(metavar="BYTES", help="The limit above the idle process.")]
Threads = Annotated[
    int | None, typer.Option(metavar="N", help="How many at once.", show_default="all usable cores")
]
Fsync = Annotated[
    bool,
    typer.Option(
        "--fsync/--no-fsync",
        help="Wait for the disk, so that committed chunks survive a power cut.",
    ),
]
Dask = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Of a Dask scheduler whose workers do it, or local."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]
