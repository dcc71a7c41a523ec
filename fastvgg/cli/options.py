"""Arguments and options of the commands, with their help.

The `Literal` types repeat those of the library because importing them would import NumPy, which
``fastvgg --help`` does not need.
"""

from typing import Annotated, Any, Final, Literal, get_args

import typer

from fastvgg import models

ModeChoice = Literal["caffe", "tf", "torch", "identity"]
LayoutChoice = Literal["NHWC", "NCHW"]
FloatChoice = Literal["float16", "bfloat16", "float32", "float64"]
DtypeChoice = Literal["uint8", FloatChoice]
InterpolationChoice = Literal["nearest", "bilinear", "bicubic", "hamming", "box", "lanczos"]
RoundingChoice = Literal["nearest", "truncate"]
FormatChoice = Literal["png", "webp", "jpeg"]
Gray16Choice = Literal["error", "scale"]

# The sections of a help screen.
MODEL: Final = "Model"
INPUT: Final = "Input"
GEOMETRY: Final = "Geometry"
OUTPUT: Final = "Output"
RUN: Final = "Run"

ARRAYS: Final = "a .npy, a .zarr (also s3://), FILE.h5::/NAME"


def _choice_option(
    choices: Any,  # noqa: ANN401  # a Literal
    panel: str,
    metavar: str,
    about: str,
    default: str | bool = True,
) -> Any:  # noqa: ANN401  # as Typer has it
    """Return an option whose choices shells complete.

    The option accepts any text: the library reports an invalid value together with the choices.
    """
    values = get_args(choices)
    return typer.Option(
        metavar=metavar,
        help=about.format(values=f"{', '.join(values[:-1])} or {values[-1]}"),
        show_default=default,
        autocompletion=lambda: list(values),
        parser=str,
        rich_help_panel=panel,
    )


def _flag(name: str, panel: str, about: str) -> Any:  # noqa: ANN401  # as Typer has it
    return typer.Option(name, help=about, rich_help_panel=panel)


# Sources and targets are str: Path would collapse the two slashes of a URL.
Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help=f"Input: a directory or tar shards of images; {ARRAYS}, or a directory of part-*.npy.",
    ),
]
StoredSource = Annotated[
    str,
    typer.Argument(metavar="SRC", help=f"Input: {ARRAYS}, or a directory of part-*.npy."),
]
ImageSource = Annotated[
    str, typer.Argument(metavar="SRC", help="Input: a directory or tar shards of images.")
]
Target = Annotated[str | None, typer.Argument(metavar="DST", help=f"Output: {ARRAYS}.")]
PackedTarget = Annotated[str, typer.Argument(metavar="DST", help=f"Output: {ARRAYS}.")]
RestoredTarget = Annotated[
    str | None,
    typer.Argument(metavar="DST", help=f"Output: a directory for image files, {ARRAYS}."),
]

ModeName = Annotated[
    ModeChoice | None, _choice_option(ModeChoice, MODEL, "MODE", "Preprocessing mode: {values}.")
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Published model; 'fastvgg models' lists them.",
        autocompletion=lambda: list(models.MODES_BY_MODEL),
        rich_help_panel=MODEL,
    ),
]

SourceLayout = Annotated[
    LayoutChoice | None,
    _choice_option(LayoutChoice, INPUT, "LAYOUT", "Input layout: {values}."),
]
Exif = Annotated[bool, _flag("--exif", INPUT, "Apply the EXIF orientation; Keras ignores it.")]
FastJpeg = Annotated[
    bool,
    _flag("--fast-jpeg", INPUT, "Decode large JPEGs at reduced scale: not exact."),
]
Gray16 = Annotated[
    Gray16Choice,
    _choice_option(Gray16Choice, INPUT, "POLICY", "16-bit gray: {values} to 8 bits."),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Reject images with more pixels.",
        show_default="89478485",
        rich_help_panel=INPUT,
    ),
]

Size = Annotated[
    tuple[int, int] | None,
    typer.Option(
        metavar="H W", help="Resize images to this height and width.", rich_help_panel=GEOMETRY
    ),
]
Interpolation = Annotated[
    InterpolationChoice,
    _choice_option(InterpolationChoice, GEOMETRY, "METHOD", "Interpolation: {values}."),
]
KeepAspectRatio = Annotated[
    bool,
    _flag("--keep-aspect-ratio", GEOMETRY, "Center-crop to the target aspect ratio, then resize."),
]

Dtype = Annotated[
    FloatChoice | None,
    _choice_option(FloatChoice, OUTPUT, "DTYPE", "Output dtype: {values}.", "float32 for uint8"),
]
RestoredDtype = Annotated[
    DtypeChoice | None,
    _choice_option(DtypeChoice, OUTPUT, "DTYPE", "Output dtype: {values}.", "uint8"),
]
OutLayout = Annotated[
    LayoutChoice | None,
    _choice_option(LayoutChoice, OUTPUT, "LAYOUT", "Output layout: {values}.", "that of SRC"),
]
Rounding = Annotated[
    RoundingChoice,
    _choice_option(RoundingChoice, OUTPUT, "METHOD", "Rounding: {values}."),
]
Format = Annotated[
    FormatChoice,
    _choice_option(FormatChoice, OUTPUT, "FORMAT", "Image files: {values} (lossy)."),
]
InPlace = Annotated[
    bool, _flag("--in-place", OUTPUT, "Overwrite SRC, a .npy file, with the result; omit DST.")
]

DryRun = Annotated[bool, _flag("--dry-run", RUN, "Print the plan and write nothing.")]
Restart = Annotated[bool, _flag("--restart", RUN, "Start over, replacing an existing DST.")]
RetryFailed = Annotated[
    bool, _flag("--retry-failed", RUN, "Retry the failed images of a finished DST.")
]
Strict = Annotated[bool, _flag("--strict", RUN, "Stop at the first image that cannot be decoded.")]
Memory = Annotated[
    str,
    typer.Option(metavar="SIZE", help="Memory limit of the run.", rich_help_panel=RUN),
]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Worker threads.",
        show_default="all usable cores",
        rich_help_panel=RUN,
    ),
]
Fsync = Annotated[bool, _flag("--fsync/--no-fsync", RUN, "Make commits survive power loss.")]
Dask = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Scheduler of the Dask cluster to run on, or 'local'.",
        rich_help_panel=RUN,
    ),
]
Quiet = Annotated[bool, _flag("--quiet", RUN, "Print no progress and no notes.")]
Json = Annotated[bool, _flag("--json", RUN, "Print the result as JSON.")]
Traceback = Annotated[bool, _flag("--traceback", RUN, "Print the Python traceback of an error.")]
