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
MissingChunksChoice = Literal["error", "fill"]

# The sections of a help screen.
MODEL_PANEL: Final = "Model"
INPUT_PANEL: Final = "Input"
GEOMETRY_PANEL: Final = "Geometry"
OUTPUT_PANEL: Final = "Output"
RUN_PANEL: Final = "Run"

IMAGES: Final = "a directory or tar shards of images"
ARRAYS: Final = "a .npy, a .zarr (also s3://), FILE.h5::/NAME"
STORED_ARRAYS: Final = f"{ARRAYS}, or a directory of part-*.npy"


def _option(panel: str, about: str, *names: str, **settings: Any) -> Any:  # noqa: ANN401
    return typer.Option(*names, help=about, rich_help_panel=panel, **settings)


def _choice(
    choices: object, panel: str, about: str, metavar: str, shown_default: bool | str = True
) -> Any:  # noqa: ANN401
    """Return an option with the choices of a Literal, which shells complete.

    The option accepts any text: the library reports an invalid value together with the choices.
    """
    values = get_args(choices)
    return _option(
        panel,
        about.format(values=f"{', '.join(values[:-1])} or {values[-1]}"),
        metavar=metavar,
        show_default=shown_default,
        autocompletion=lambda: list(values),
        parser=str,
    )


# Sources and targets are str: Path would collapse the two slashes of a URL.
SourceArgument = Annotated[
    str, typer.Argument(metavar="SRC", help=f"Input: {IMAGES}; {STORED_ARRAYS}.")
]
ArraySourceArgument = Annotated[str, typer.Argument(metavar="SRC", help=f"Input: {STORED_ARRAYS}.")]
ImageSourceArgument = Annotated[str, typer.Argument(metavar="SRC", help=f"Input: {IMAGES}.")]
TargetArgument = Annotated[str | None, typer.Argument(metavar="DST", help=f"Output: {ARRAYS}.")]
PackTargetArgument = Annotated[str, typer.Argument(metavar="DST", help=f"Output: {ARRAYS}.")]
RestoreTargetArgument = Annotated[
    str | None,
    typer.Argument(metavar="DST", help=f"Output: a directory for image files, {ARRAYS}."),
]

ModeName = Annotated[
    ModeChoice | None, _choice(ModeChoice, MODEL_PANEL, "Preprocessing mode: {values}.", "MODE")
]
Model = Annotated[
    str | None,
    _option(
        MODEL_PANEL,
        "Keras model; 'fastvgg models' lists them.",
        metavar="NAME",
        autocompletion=lambda: list(models.MODES_BY_MODEL),
    ),
]

SourceLayout = Annotated[
    LayoutChoice | None, _choice(LayoutChoice, INPUT_PANEL, "Input layout: {values}.", "LAYOUT")
]
Exif = Annotated[
    bool, _option(INPUT_PANEL, "Apply the EXIF orientation; Keras ignores it.", "--exif")
]
FastJpeg = Annotated[
    bool, _option(INPUT_PANEL, "Decode large JPEGs at reduced scale: not exact.", "--fast-jpeg")
]
ScaleToUint8 = Annotated[
    bool,
    _option(INPUT_PANEL, "Scale 16-bit and float images to 8 bits.", "--scale-to-uint8"),
]
MaxPixels = Annotated[
    int | None,
    _option(INPUT_PANEL, "Reject images of more pixels.", metavar="N", show_default="89478485"),
]

FollowLinks = Annotated[
    bool,
    _option(
        INPUT_PANEL,
        "Follow symbolic links below SRC.",
        "--follow-links/--no-follow-links",
        show_default="on",
    ),
]

MissingChunks = Annotated[
    MissingChunksChoice,
    _choice(
        MissingChunksChoice,
        INPUT_PANEL,
        "Missing chunks of a Zarr or HDF5 array: {values} (with its fill value).",
        "POLICY",
    ),
]

Size = Annotated[
    tuple[int, int] | None,
    _option(GEOMETRY_PANEL, "Resize images to this height and width.", metavar="H W"),
]
Interpolation = Annotated[
    InterpolationChoice,
    _choice(InterpolationChoice, GEOMETRY_PANEL, "Interpolation: {values}.", "METHOD"),
]
KeepAspectRatio = Annotated[
    bool,
    _option(
        GEOMETRY_PANEL,
        "Center-crop to the target aspect ratio, then resize.",
        "--keep-aspect-ratio",
    ),
]

Dtype = Annotated[
    FloatChoice | None,
    _choice(FloatChoice, OUTPUT_PANEL, "Output dtype: {values}.", "DTYPE", "float32 for uint8"),
]
RestoredDtype = Annotated[
    DtypeChoice | None,
    _choice(DtypeChoice, OUTPUT_PANEL, "Output dtype: {values}.", "DTYPE", "uint8"),
]
OutLayout = Annotated[
    LayoutChoice | None,
    _choice(LayoutChoice, OUTPUT_PANEL, "Output layout: {values}.", "LAYOUT", "that of SRC"),
]
Rounding = Annotated[
    RoundingChoice, _choice(RoundingChoice, OUTPUT_PANEL, "Rounding: {values}.", "METHOD")
]
Format = Annotated[
    FormatChoice,
    _choice(FormatChoice, OUTPUT_PANEL, "Image file format: {values} (lossy).", "FORMAT"),
]
InPlace = Annotated[
    bool, _option(OUTPUT_PANEL, "Overwrite SRC, a .npy file of floats; omit DST.", "--in-place")
]

DryRun = Annotated[bool, _option(RUN_PANEL, "Print the plan and write nothing.", "--dry-run")]
Restart = Annotated[
    bool, _option(RUN_PANEL, "Start over, replacing a DST that fastvgg wrote.", "--restart")
]
RetryFailed = Annotated[
    bool, _option(RUN_PANEL, "Retry the failed images of a finished DST.", "--retry-failed")
]
Strict = Annotated[bool, _option(RUN_PANEL, "Stop at the first failed image.", "--strict")]
Memory = Annotated[str, _option(RUN_PANEL, "Memory limit of the run.", metavar="SIZE")]
Threads = Annotated[
    int | None,
    _option(RUN_PANEL, "Worker threads.", metavar="N", show_default="all available CPUs"),
]
Fsync = Annotated[
    bool,
    _option(RUN_PANEL, "Make commits survive power loss.", "--fsync/--no-fsync", show_default="on"),
]
CheckValues = Annotated[
    bool,
    _option(
        INPUT_PANEL,
        "Reject floats within 0..1 or -1..1.",
        "--check-values/--no-check-values",
        show_default="on",
    ),
]
Dask = Annotated[
    str | None,
    _option(RUN_PANEL, "Address of a Dask scheduler, or 'local'.", metavar="ADDRESS"),
]
Quiet = Annotated[bool, _option(RUN_PANEL, "Print no progress and no notes.", "--quiet")]
Json = Annotated[bool, _option(RUN_PANEL, "Print the result as JSON.", "--json")]
Traceback = Annotated[
    bool, _option(RUN_PANEL, "Print the Python traceback of an error.", "--traceback")
]
