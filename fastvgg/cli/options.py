"""What every verb takes: arguments and options, with what their help says."""

from typing import Annotated

import typer

# As texts, for a Path would make one slash of the two of a URL.
Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A directory or tar shards of images; a .npy, a .zarr (also s3://), FILE.h5::/NAME, "
        "or a directory of part-*.npy.",
    ),
]
Target = Annotated[
    str | None,
    typer.Argument(
        metavar="[DST]", help="What to write: a .npy, a .zarr (also s3://), FILE.h5::/NAME."
    ),
]
Size = Annotated[
    tuple[int, int] | None,
    typer.Option(metavar="H W", help="Resize images to this height and width."),
]
Interpolation = Annotated[
    str, typer.Option(help="nearest, bilinear, bicubic, hamming, box or lanczos.")
]
KeepAspectRatio = Annotated[
    bool, typer.Option("--keep-aspect-ratio", help="Cut out the wanted shape before resizing.")
]
FastJpeg = Annotated[
    bool, typer.Option("--fast-jpeg", help="Decode large JPEGs smaller: other pixels than Keras'.")
]
Exif = Annotated[bool, typer.Option("--exif", help="Turn images as EXIF says; Keras does not.")]
SixteenBit = Annotated[str, typer.Option(help="Greys of 16 bits: refuse them, or scale them to 8.")]
MaxPixels = Annotated[
    int | None, typer.Option(help="Refuse larger images before decoding: 89478485 if not given.")
]
Format = Annotated[
    str, typer.Option("--format", help="Of image files: png, webp (lossless) or jpeg (lossy).")
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Try again what failed in a finished DST.")
]
ModeName = Annotated[str | None, typer.Option("--mode", help="caffe, tf, torch or identity.")]
Model = Annotated[str | None, typer.Option(help="A published model's name instead of a mode.")]
SourceLayout = Annotated[str | None, typer.Option("--layout", help="Of SRC: NHWC or NCHW.")]
OutLayout = Annotated[str | None, typer.Option(help="Of DST: NHWC or NCHW.")]
Dtype = Annotated[str | None, typer.Option(help="Of DST: float16, bfloat16, float32, float64.")]
Memory = Annotated[str, typer.Option(help="The limit above the idle process.")]
Threads = Annotated[int | None, typer.Option(help="All usable cores if not given.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Make a .npy its own result: no DST.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin again; replace an existing DST.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Durability = Annotated[
    str, typer.Option(help="What a committed chunk survives: a power cut, or the process' end.")
]
Dask = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Of a Dask scheduler whose workers do it, or local."),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]
