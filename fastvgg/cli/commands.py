"""The verbs: each is one call of the library."""

import dataclasses
import sys
from typing import Annotated, Final

import typer

import fastvgg
from fastvgg import models
from fastvgg.cli.carry import execute
from fastvgg.cli.errors import EXIT_CODES, Command, translate_errors
from fastvgg.cli.guide import WELCOME
from fastvgg.cli.lines import echo
from fastvgg.cli.options import (
    Dask,
    DryRun,
    Dtype,
    Exif,
    FastJpeg,
    Format,
    Fsync,
    Gray16,
    InPlace,
    Interpolation,
    Json,
    KeepAspectRatio,
    MaxPixels,
    Memory,
    Model,
    ModeName,
    OutLayout,
    Quiet,
    Restart,
    RestoredDtype,
    RestoredTarget,
    RetryFailed,
    Rounding,
    Size,
    Source,
    SourceLayout,
    StoredSource,
    Strict,
    Target,
    Threads,
    Traceback,
)
from fastvgg.cli.output import print_benchmark, print_info, print_json
from fastvgg.errors import UsageError

__all__ = ["app"]

SEE_CODES: Final = "Exit codes: 'fastvgg --help' lists them."

app = typer.Typer(
    name="fastvgg",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command(cls=Command, epilog=SEE_CODES)
def preprocess(
    source: Source,
    target: Target = None,
    mode: ModeName = None,
    model: Model = None,
    size: Size = None,
    dtype: Dtype = None,
    layout: SourceLayout = None,
    out_layout: OutLayout = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    retry_failed: RetryFailed = False,
    in_place: InPlace = False,
    interpolation: Interpolation = "nearest",
    keep_aspect_ratio: KeepAspectRatio = False,
    fast_jpeg: FastJpeg = False,
    exif: Exif = False,
    gray16: Gray16 = "error",
    max_pixels: MaxPixels = None,
    strict: Strict = False,
    memory: Memory = "512MiB",
    threads: Threads = None,
    fsync: Fsync = True,
    dask: Dask = None,
    quiet: Quiet = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Turn images into network input.

    A run that was cut off goes on when the same command is given again.

    Example: fastvgg preprocess photos/ train.npy --model vgg19 --size 224 224
    """
    with translate_errors(traceback):
        plan = fastvgg.plan(
            source,
            target,
            in_place=in_place,
            mode=_mode(mode, model),
            size=size,
            interpolation=interpolation,
            keep_aspect_ratio=keep_aspect_ratio,
            fast_jpeg=fast_jpeg,
            exif=exif,
            gray16=gray16,  # type: ignore[arg-type]  # checked by DecodeOptions
            max_pixels=max_pixels,
            layout=layout,  # type: ignore[arg-type]  # checked by Transform
            out_layout=out_layout,  # type: ignore[arg-type]
            dtype=dtype,
            memory=memory,
            threads=threads,
            strict=strict,
            restart=restart,
            retry_failed=retry_failed,
            fsync=fsync,
        )
        execute(plan, dask, dry_run=dry_run, as_json=as_json, quiet=quiet)


@app.command(cls=Command, epilog=SEE_CODES)
def pack(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A directory or tar shards of images.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="A .npy, a .zarr (also s3://), FILE.h5::/NAME.")
    ],
    size: Size = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    retry_failed: RetryFailed = False,
    interpolation: Interpolation = "nearest",
    keep_aspect_ratio: KeepAspectRatio = False,
    fast_jpeg: FastJpeg = False,
    exif: Exif = False,
    gray16: Gray16 = "error",
    max_pixels: MaxPixels = None,
    strict: Strict = False,
    memory: Memory = "512MiB",
    threads: Threads = None,
    fsync: Fsync = True,
    dask: Dask = None,
    quiet: Quiet = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Store images as uint8, for later.

    It takes a quarter of the disk that network input in float32 does.

    Example: fastvgg pack photos/ packed.npy --size 224 224
    """
    with translate_errors(traceback):
        plan = fastvgg.plan(
            source,
            target,
            direction="pack",
            size=size,
            interpolation=interpolation,
            keep_aspect_ratio=keep_aspect_ratio,
            fast_jpeg=fast_jpeg,
            exif=exif,
            gray16=gray16,  # type: ignore[arg-type]  # checked by DecodeOptions
            max_pixels=max_pixels,
            memory=memory,
            threads=threads,
            strict=strict,
            restart=restart,
            retry_failed=retry_failed,
            fsync=fsync,
        )
        execute(plan, dask, dry_run=dry_run, as_json=as_json, quiet=quiet)


@app.command(cls=Command, epilog=SEE_CODES)
def restore(
    source: StoredSource,
    target: RestoredTarget = None,
    mode: ModeName = None,
    model: Model = None,
    rounding: Rounding = "nearest",
    file_format: Format = "png",
    dtype: RestoredDtype = None,
    layout: SourceLayout = None,
    out_layout: OutLayout = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    in_place: InPlace = False,
    strict: Strict = False,
    memory: Memory = "512MiB",
    threads: Threads = None,
    fsync: Fsync = True,
    dask: Dask = None,
    quiet: Quiet = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Turn network input back into exact images.

    Into an array, or a directory of image files.

    Example: fastvgg restore train.npy images/
    """
    with translate_errors(traceback):
        plan = fastvgg.plan(
            source,
            target,
            in_place=in_place,
            mode=_mode(mode, model),
            direction="restore",
            rounding=rounding,  # type: ignore[arg-type]  # checked by Transform
            format=file_format,  # type: ignore[arg-type]  # checked by the plan
            layout=layout,  # type: ignore[arg-type]
            out_layout=out_layout,  # type: ignore[arg-type]
            dtype=dtype,
            memory=memory,
            threads=threads,
            strict=strict,
            restart=restart,
            fsync=fsync,
        )
        execute(plan, dask, dry_run=dry_run, as_json=as_json, quiet=quiet)


@app.command(cls=Command, epilog=SEE_CODES)
def verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A finished dataset.")],
    full: Annotated[
        bool, typer.Option("--full", help="Recompute every image, not a sample.")
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Prove that a dataset is what was written.

    By the checksum of every chunk, and by images that are computed again in plain NumPy.

    Example: fastvgg verify train.npy --full
    """
    with translate_errors(traceback):
        verification = fastvgg.verify(path, full=full)
        if as_json:
            print_json(dataclasses.asdict(verification))
        else:
            echo(str(verification), sys.stdout)


@app.command(cls=Command, epilog=SEE_CODES)
def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A dataset, finished or not.")],
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Tell what a dataset or unfinished run is.

    Its shape, type and mode, where it came from, and what to do next.

    Example: fastvgg info train.npy
    """
    with translate_errors(traceback):
        from fastvgg.stream.info import info as info_of

        known = info_of(path)
        if as_json:
            print_json(known)
            return
        print_info(known)


@app.command("models", cls=Command, epilog=SEE_CODES)
def models_(as_json: Json = False) -> None:
    """List which mode each model wants.

    Example: fastvgg models
    """
    if as_json:
        print_json(models.MODES_BY_MODEL)
        return
    for model, mode in models.MODES_BY_MODEL.items():
        print(f"{model:<20}{mode}")


@app.command(cls=Command, epilog=SEE_CODES)
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="The common kernels alone: 15 seconds.")
    ] = False,
    images: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Decode these, too: a directory or tar shards."),
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write a file there, too, read it, and remove it."),
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the figures: a .svg or .png.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Measure this machine, and every kernel.

    The memory and each kernel as a share of it, the oracle beside it, decoding and a disk where
    they are given. Every result is compared with the oracle's.

    Example: fastvgg bench --quick --plot roofline.svg
    """
    with translate_errors(traceback):
        from pathlib import Path

        from fastvgg.bench import FULL, QUICK, measure, roofline
        from fastvgg.bench.report import LOW_SHARE, low_paths
        from fastvgg.storage.location import parse_location

        if plot is not None:
            roofline.check(Path(plot))
        record = measure(
            QUICK if quick else FULL,
            images=None if images is None else parse_location(images),
            disk=None if disk is None else Path(disk),
            threads=threads,
            tell=None if as_json else print_benchmark(),
        )
        if plot is not None:
            roofline.draw(record, Path(plot))
        if as_json:
            print_json(record)
            return
        print("every result is the oracle's, bit for bit")
        print(f"a call takes {record['call_overhead_us']:.0f} microseconds above its kernel")
        print(f"the kernels are compiled for {record['instruction_set']}")
        if low := low_paths(record):
            print(f"below {LOW_SHARE:.0%} of the limit (<): {len(low)}. If that repeats on an idle")
            print("machine, please report it with the output of: fastvgg bench --json")


@app.command(cls=Command, epilog=SEE_CODES)
def demo(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A new directory.")],
    traceback: Traceback = False,
) -> None:
    """Go the whole way on real photographs.

    There and back, with proof that every byte is equal, and a contact sheet to look at.

    Example: fastvgg demo demo/
    """
    with translate_errors(traceback):
        from pathlib import Path

        from fastvgg.demo import demonstrate

        shown = demonstrate(Path(directory), say=print)
        echo(
            f"every byte came back: {shown.images} photographs, {shown.compared_bytes} bytes "
            f"compared, {shown.differing_bytes} differ",
            sys.stdout,
        )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastvgg {fastvgg.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _welcome(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it, and exit."
        ),
    ] = False,
) -> None:
    """Turn images into the exact bits that a pretrained network expects, and back."""
    if context.invoked_subcommand is None:
        print(WELCOME)


def _mode(mode: str | None, model: str | None) -> "fastvgg.Mode | str | None":
    if model is None:
        return mode
    wanted = fastvgg.Mode.for_model(model)
    if mode not in (None, wanted.name):
        raise UsageError(
            f"--mode {mode} and --model {model} disagree: {model} wants {wanted.name}",
            "give one of the two",
        )
    return wanted
