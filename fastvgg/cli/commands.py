"""The commands: each one calls the library once."""

import dataclasses
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

import fastvgg
from fastvgg import models
from fastvgg.cli import options
from fastvgg.cli.errors import (
    EXIT_CODES,
    SOME_INPUTS_FAILED,
    Command,
    Commands,
    stop_run,
    translate_errors,
)
from fastvgg.cli.native import hidden_native_messages
from fastvgg.cli.output import (
    echo,
    plan_record,
    print_benchmark,
    print_info,
    print_json,
    print_report,
    progress_bar,
    show,
)
from fastvgg.errors import UsageError

if TYPE_CHECKING:
    from distributed import Client

    from fastvgg.transform import Direction

WELCOME: Final = """\
fastvgg turns images into the exact input that a pretrained network expects,
and turns network input back into the exact images.

See it on real photographs (in a clone: pip install '.[demo]'):
  fastvgg demo demo/
Preprocess a directory of images (add --dry-run to print the plan only):
  fastvgg preprocess photos/ train.npy --model vgg19 --size 224 224
Restore the images:
  fastvgg restore train.npy images/
Verify a dataset, or describe it:
  fastvgg verify train.npy
  fastvgg info train.npy

All commands: fastvgg --help. One command: fastvgg preprocess --help.
To resume an interrupted run, rerun the same command."""

EXIT_CODES_HINT: Final = "Exit codes: 'fastvgg --help' lists them."

app = typer.Typer(
    name="fastvgg",
    cls=Commands,
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


# The order of the parameters is the order of the help screen. `locals()` contains only them.
@app.command(cls=Command, epilog=EXIT_CODES_HINT)
def preprocess(
    source: options.SourceArgument,
    target: options.TargetArgument = None,
    model: options.Model = None,
    mode: options.ModeName = None,
    layout: options.SourceLayout = None,
    exif: options.Exif = False,
    fast_jpeg: options.FastJpeg = False,
    scale_to_uint8: options.ScaleToUint8 = False,
    max_pixels: options.MaxPixels = None,
    follow_links: options.FollowLinks = True,
    check_values: options.CheckValues = True,
    missing_chunks: options.MissingChunks = "error",
    size: options.Size = None,
    interpolation: options.Interpolation = "nearest",
    keep_aspect_ratio: options.KeepAspectRatio = False,
    dtype: options.Dtype = None,
    out_layout: options.OutLayout = None,
    in_place: options.InPlace = False,
    dry_run: options.DryRun = False,
    restart: options.Restart = False,
    retry_failed: options.RetryFailed = False,
    strict: options.Strict = False,
    memory: options.Memory = "512MiB",
    threads: options.Threads = None,
    fsync: options.Fsync = True,
    dask: options.Dask = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """Turn images into network input.

    Rerun the same command to resume an interrupted run.

    Example: fastvgg preprocess photos/ train.npy --model vgg19 --size 224 224
    """
    _convert("preprocess", **locals())


@app.command(cls=Command, epilog=EXIT_CODES_HINT)
def pack(
    source: options.ImageSourceArgument,
    target: options.PackTargetArgument,
    exif: options.Exif = False,
    fast_jpeg: options.FastJpeg = False,
    scale_to_uint8: options.ScaleToUint8 = False,
    max_pixels: options.MaxPixels = None,
    follow_links: options.FollowLinks = True,
    size: options.Size = None,
    interpolation: options.Interpolation = "nearest",
    keep_aspect_ratio: options.KeepAspectRatio = False,
    dry_run: options.DryRun = False,
    restart: options.Restart = False,
    retry_failed: options.RetryFailed = False,
    strict: options.Strict = False,
    memory: options.Memory = "512MiB",
    threads: options.Threads = None,
    fsync: options.Fsync = True,
    dask: options.Dask = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """Store resized images as one uint8 array.

    It takes a quarter of the disk space of float32 network input.

    Example: fastvgg pack photos/ packed.npy --size 224 224
    """
    _convert("pack", **locals())


@app.command(cls=Command, epilog=EXIT_CODES_HINT)
def restore(
    source: options.ArraySourceArgument,
    target: options.RestoreTargetArgument = None,
    model: options.Model = None,
    mode: options.ModeName = None,
    layout: options.SourceLayout = None,
    follow_links: options.FollowLinks = True,
    missing_chunks: options.MissingChunks = "error",
    rounding: options.Rounding = "nearest",
    dtype: options.RestoredDtype = None,
    out_layout: options.OutLayout = None,
    format: options.Format = "png",  # noqa: A002  # as `fastvgg.plan` calls it
    in_place: options.InPlace = False,
    dry_run: options.DryRun = False,
    restart: options.Restart = False,
    strict: options.Strict = False,
    memory: options.Memory = "512MiB",
    threads: options.Threads = None,
    fsync: options.Fsync = True,
    dask: options.Dask = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """Turn network input back into exact images.

    The result is an array or a directory of image files.

    Example: fastvgg restore train.npy images/
    """
    _convert("restore", **locals())


@app.command(cls=Command, epilog=EXIT_CODES_HINT)
def verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A finished dataset.")],
    full: Annotated[
        bool, typer.Option("--full", help="Recompute every image instead of a sample.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Recompute damaged chunks from the source.")
    ] = False,
    memory: options.Memory = "512MiB",
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """Verify the bytes of a finished dataset.

    Compares the checksum of every chunk, and recomputes images with the NumPy reference. Lists all
    damaged chunks; --repair overwrites them if the recomputed bytes have the recorded checksums.

    Example: fastvgg verify train.npy --full
    """
    with translate_errors(traceback):
        with progress_bar("verify", 0, "checks", quiet=quiet) as on_progress:
            verification = fastvgg.verify(
                path,
                full=full,
                threads=threads,
                memory=memory,
                repair=repair,
                progress=on_progress,
            )
        fields = dataclasses.asdict(verification)
        print_json(fields) if as_json else echo(str(verification), sys.stdout)


@app.command(cls=Command, epilog=EXIT_CODES_HINT)
def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A dataset, finished or not.")],
    as_json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """Describe a dataset or an unfinished run.

    Prints its shape, dtype, mode and source, and the next command.

    Example: fastvgg info train.npy
    """
    with translate_errors(traceback):
        from fastvgg.stream.info import info as read_info

        properties = read_info(path)
        print_json(properties) if as_json else print_info(properties)


@app.command("models", cls=Command, epilog=EXIT_CODES_HINT)
def models_(as_json: options.Json = False, traceback: options.Traceback = False) -> None:
    """List the Keras models and their modes.

    Example: fastvgg models
    """
    with translate_errors(traceback):
        if as_json:
            print_json(models.MODES_BY_MODEL)
            return
        for model, mode in models.MODES_BY_MODEL.items():
            show(f"{model:<20}{mode}")


@app.command(cls=Command, epilog=EXIT_CODES_HINT)
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure only the common kernels (about 15 s).")
    ] = False,
    images: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Also measure decoding: a directory or tar shards."),
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Also measure writing and reading a file in DIR."),
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Plot the results as a .svg or .png.")
    ] = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """Measure kernels against memory bandwidth.

    Also measures the NumPy reference, and on request image decoding and a disk. Every result is
    compared bit for bit with the NumPy reference.

    Example: fastvgg bench --quick --plot roofline.svg
    """
    with translate_errors(traceback):
        from fastvgg.bench import FULL, QUICK, measure, report

        if plot is not None:
            report.check_plot_path(Path(plot))
        record = measure(
            QUICK if quick else FULL,
            images=images,
            disk=None if disk is None else Path(disk),
            threads=threads,
            on_figure=None if as_json else print_benchmark(),
        )
        if plot is not None:
            report.draw_roofline(record, Path(plot))
        if as_json:
            print_json(record)
            return
        show("every result matches the NumPy reference, bit for bit")
        show(f"per-call overhead: {record['call_overhead_us']:.0f} microseconds")
        show(f"kernels compiled for {record['instruction_set']}")
        if low := report.low_paths(record):
            show(f"below {report.MIN_SHARE:.0%} of the limit (<): {len(low)}. If this repeats on")
            show("an idle machine, please report it with the output of: fastvgg bench --json")


@app.command(cls=Command, epilog=EXIT_CODES_HINT)
def demo(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A directory, new or of a demo.")],
    traceback: options.Traceback = False,
) -> None:
    """Run an end-to-end demo on photographs.

    Preprocesses, verifies and restores them, compares every byte, and draws a contact sheet.

    Example: fastvgg demo demo/
    """
    with translate_errors(traceback):
        from fastvgg.demo import run_demo

        with stop_run():
            result = run_demo(Path(directory), echo=show)
        echo(
            f"every byte was restored: {result.images} photographs, {result.compared_bytes} bytes "
            "compared, 0 differ",
            sys.stdout,
        )


def _print_version(is_requested: bool) -> None:
    if is_requested:
        show(f"fastvgg {fastvgg.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _welcome(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Turn images into the exact input of a pretrained network, and back."""
    if context.invoked_subcommand is None:
        show(WELCOME)


def _convert(
    direction: "Direction",
    *,
    dry_run: bool,
    dask: str | None,
    quiet: bool,
    as_json: bool,
    traceback: bool,
    **arguments: Any,
) -> None:
    """Plan a conversion, then print or run the plan; `arguments` are passed to `fastvgg.plan`."""
    with translate_errors(traceback):
        plan = fastvgg.plan(direction=direction, **arguments)
        if dry_run:
            print_json(plan_record(plan)) if as_json else show(str(plan))
            return
        for note in plan.notes if not quiet else ():
            echo(f"note: {note}", sys.stderr)
        with (
            stop_run(),
            _connect(dask) as client,
            nullcontext() if traceback or dask is not None else hidden_native_messages(),
            progress_bar(direction, plan.header.images, "images", quiet=quiet) as on_progress,
        ):
            report = plan.run(on_progress, client=client)
        print_json(dataclasses.asdict(report)) if as_json else print_report(report)
        if report.counts["failed"]:
            if direction != "restore":
                echo(f"  {report.remedy}", sys.stderr)
            raise typer.Exit(SOME_INPUTS_FAILED)


def _connect(dask: str | None) -> "AbstractContextManager[Client | None]":
    """Return a context with a client of the Dask scheduler, or with None without --dask."""
    if dask is None:
        return nullcontext()
    try:
        from fastvgg.executors import dask as cluster
    except ImportError as error:
        raise UsageError(
            f"--dask needs a package that is not installed: {error.name}",
            "in a clone of fastvgg: pip install '.[dask]'",
        ) from None
    return cluster.connect(dask)
