"""Verbs and options -> calls; progress and tables; exit codes.

0 done, 1 finished but some inputs failed, 2 usage, 3 refused before anything was written,
4 verification found a difference, 5 stopped by an I/O error and resumable, 130 interrupted and
resumable, 70 a defect of fastvgg itself.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from traceback import print_exc
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

import fastvgg
from fastvgg import models
from fastvgg.errors import FastvggError, StoppedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType, TracebackType

    from distributed import Client

    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Progress, Report
    from fastvgg.transform import Mode

__all__ = ["app", "main"]

SOME_FAILED: Final = 1
INTERRUPTED: Final = 130
DEFECT: Final = 70
FAILURES_SHOWN: Final = 10
SECONDS_BETWEEN_LINES: Final = 5.0

app = typer.Typer(
    name="fastvgg",
    help="Images to the exact bits that a pretrained network expects, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
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


@app.command()
def preprocess(
    source: Source,
    target: Target = None,
    mode: ModeName = None,
    model: Model = None,
    size: Size = None,
    interpolation: Interpolation = "nearest",
    keep_aspect_ratio: KeepAspectRatio = False,
    fast_jpeg: FastJpeg = False,
    exif: Exif = False,
    sixteen_bit: SixteenBit = "refuse",
    max_pixels: MaxPixels = None,
    layout: SourceLayout = None,
    out_layout: OutLayout = None,
    dtype: Dtype = None,
    memory: Memory = "512MiB",
    threads: Threads = None,
    in_place: InPlace = False,
    strict: Strict = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    retry_failed: RetryFailed = False,
    durability: Durability = "power",
    dask: Dask = None,
    as_json: Json = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Turn images into network input.

    Example: fastvgg preprocess photos/ train.npy --model vgg19 --size 224 224
    """
    with _exits(traceback):
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
            sixteen_bit=sixteen_bit,  # type: ignore[arg-type]  # checked by Decoding
            max_pixels=max_pixels,
            layout=layout,  # type: ignore[arg-type]  # checked by Transform
            out_layout=out_layout,  # type: ignore[arg-type]
            dtype=dtype,
            memory=memory,
            threads=threads,
            strict=strict,
            restart=restart,
            retry_failed=retry_failed,
            durability=durability,  # type: ignore[arg-type]  # checked by the plan
        )
        _carry_out(plan, dask, dry_run=dry_run, as_json=as_json, quiet=quiet)


@app.command()
def pack(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A directory or tar shards of images.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="A .npy, a .zarr (also s3://), FILE.h5::/NAME.")
    ],
    size: Size = None,
    interpolation: Interpolation = "nearest",
    keep_aspect_ratio: KeepAspectRatio = False,
    fast_jpeg: FastJpeg = False,
    exif: Exif = False,
    sixteen_bit: SixteenBit = "refuse",
    max_pixels: MaxPixels = None,
    memory: Memory = "512MiB",
    threads: Threads = None,
    strict: Strict = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    retry_failed: RetryFailed = False,
    durability: Durability = "power",
    dask: Dask = None,
    as_json: Json = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Store images as they are, as uint8, to be preprocessed later: a quarter of the disk.

    Example: fastvgg pack photos/ packed.npy --size 224 224
    """
    with _exits(traceback):
        plan = fastvgg.plan(
            source,
            target,
            direction="pack",
            size=size,
            interpolation=interpolation,
            keep_aspect_ratio=keep_aspect_ratio,
            fast_jpeg=fast_jpeg,
            exif=exif,
            sixteen_bit=sixteen_bit,  # type: ignore[arg-type]  # checked by Decoding
            max_pixels=max_pixels,
            memory=memory,
            threads=threads,
            strict=strict,
            restart=restart,
            retry_failed=retry_failed,
            durability=durability,  # type: ignore[arg-type]  # checked by the plan
        )
        _carry_out(plan, dask, dry_run=dry_run, as_json=as_json, quiet=quiet)


@app.command()
def restore(
    source: Source,
    target: Target = None,
    mode: ModeName = None,
    model: Model = None,
    rounding: Annotated[str, typer.Option(help="nearest or truncate.")] = "nearest",
    file_format: Format = "png",
    layout: SourceLayout = None,
    out_layout: OutLayout = None,
    dtype: Annotated[str | None, typer.Option(help="Of DST, if not uint8.")] = None,
    memory: Memory = "512MiB",
    threads: Threads = None,
    in_place: InPlace = False,
    strict: Strict = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    durability: Durability = "power",
    dask: Dask = None,
    as_json: Json = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Turn network input back into the exact images: an array, or a directory of image files.

    Example: fastvgg restore train.npy images/
    """
    with _exits(traceback):
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
            durability=durability,  # type: ignore[arg-type]  # checked by the plan
        )
        _carry_out(plan, dask, dry_run=dry_run, as_json=as_json, quiet=quiet)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A finished dataset.")],
    full: Annotated[
        bool, typer.Option("--full", help="Recompute every image, not a sample.")
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Prove a dataset: the checksum of every chunk, and images computed again by the oracle.

    Example: fastvgg verify train.npy --full
    """
    with _exits(traceback):
        verification = fastvgg.verify(path, full=full)
        _print_json(dataclasses.asdict(verification)) if as_json else print(verification)


@app.command()
def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A dataset, finished or not.")],
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Tell what a dataset is: shape, type, mode, where it came from, how far a run is.

    Example: fastvgg info train.npy
    """
    with _exits(traceback):
        from fastvgg.stream.info import info as info_of

        known = info_of(path)
        if as_json:
            _print_json(known)
            return
        for name, value in known.items():
            if value not in (None, [], ""):
                print(f"{name:<17}{_readable(value)}")


@app.command("models")
def models_(as_json: Json = False) -> None:
    """Tell which mode each published model wants.

    Example: fastvgg models
    """
    if as_json:
        _print_json(models.MODES_BY_MODEL)
        return
    for model, mode in models.MODES_BY_MODEL.items():
        print(f"{model:<20}{mode}")


@app.command()
def demo(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A new directory.")],
    traceback: Traceback = False,
) -> None:
    """Go the whole way on real photographs, prove equality, and draw it as a contact sheet.

    Example: fastvgg demo demo/
    """
    with _exits(traceback):
        from pathlib import Path

        from fastvgg.demo import demonstrate

        shown = demonstrate(Path(directory), say=print)
        print(
            f"every byte came back: {shown.images} photographs, {shown.compared_bytes} bytes "
            f"compared, {shown.differing_bytes} differ"
        )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastvgg {fastvgg.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Images to the exact bits that a pretrained network expects, and back."""


def _mode(mode: str | None, model: str | None) -> Mode | str | None:
    if model is None:
        return mode
    wanted = fastvgg.Mode.for_model(model)
    if mode not in (None, wanted.name):
        raise UsageError(
            f"--mode {mode} and --model {model} disagree: {model} wants {wanted.name}",
            "give one of the two",
        )
    return wanted


def _carry_out(plan: Plan, dask: str | None, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Print or run a plan, and exit with 1 if some inputs failed."""
    if dry_run:
        _print_json(_plan_record(plan)) if as_json else print(plan)
        return
    for note in plan.notes if not quiet else ():
        print(f"note: {note}", file=sys.stderr)
    with _connected(dask) as client, _progress(plan, quiet=quiet) as tell:
        report = plan.run(tell, client=client)
    _print_json(dataclasses.asdict(report)) if as_json else _print_report(report)
    if report.counts["failed"]:
        raise typer.Exit(SOME_FAILED)


@contextmanager
def _connected(dask: str | None) -> Iterator[Client | None]:
    if dask is None:
        yield None
        return
    try:
        from fastvgg import cluster
    except ImportError as error:
        raise UsageError(
            f"--dask needs a package that is not installed: {error.name}",
            "install it: pip install 'fastvgg[dask]'",
        ) from None
    with cluster.connected(dask) as client:
        yield client


def _plan_record(plan: Plan) -> dict[str, Any]:
    return {
        **plan.job(),
        "images": plan.header.images,
        "chunks": plan.chunks,
        "chunk_images": plan.chunk_images,
        "committed_chunks": plan.committed_chunks,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "projected_bytes": plan.projected_bytes,
        "memory_bytes": plan.memory_bytes,
        "notes": list(plan.notes),
    }


def _print_report(report: Report) -> None:
    print(report)
    for failure in report.failures[:FAILURES_SHOWN]:
        print(f"  failed: row {failure.row}, {failure.path}: {failure.reason}", file=sys.stderr)
    if len(report.failures) > FAILURES_SHOWN:
        more = len(report.failures) - FAILURES_SHOWN
        print(f"  and {more} more, all listed in {report.target}.index.csv", file=sys.stderr)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))


def _readable(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return " x ".join(str(item) for item in value)
    return str(value)


@contextmanager
def _progress(plan: Plan, *, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Show how far a run is: a bar on a terminal, a line every few seconds elsewhere."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(plan) as tell:
            yield tell
    else:
        yield _lines()


@contextmanager
def _bar(plan: Plan) -> Iterator[Callable[[Progress], None]]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn(plan.transform.direction),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[speed]}"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=plan.header.images, speed="")

        def tell(at: Progress) -> None:
            bar.update(task, completed=at.images, speed=_speed(at))

        yield tell


def _lines() -> Callable[[Progress], None]:
    last_told = time.monotonic()

    def tell(at: Progress) -> None:
        nonlocal last_told
        if time.monotonic() - last_told < SECONDS_BETWEEN_LINES:
            return
        last_told = time.monotonic()
        left_seconds = at.seconds / at.computed_images * (at.of_images - at.images)
        print(
            f"{at.images} of {at.of_images} images, {_speed(at)}, {left_seconds:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return tell


def _speed(at: Progress) -> str:
    seconds = max(at.seconds, 1e-9)
    megabytes = (at.read_bytes + at.written_bytes) / 1e6
    return f"{at.computed_images / seconds:.0f} images/s, {megabytes / seconds:.0f} MB/s"


@contextmanager
def _exits(traceback: bool) -> Iterator[None]:
    """Turn errors into what a person reads, and into exit codes."""
    try:
        yield
    except FastvggError as error:
        if traceback:
            print_exc()
        _tell(error.problem, error.remedy)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        _tell("interrupted", "what was committed is kept: the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        stopped = StoppedError.from_os_error(error, "a system call", str(error.filename), 0)
        if traceback:
            print_exc()
        _tell(stopped.problem, stopped.remedy)
        raise typer.Exit(stopped.exit_code) from None


def _tell(problem: str, remedy: str) -> None:
    print(f"fastvgg: {problem}\n  {remedy}", file=sys.stderr)


def _show_warning(message: Warning | str, *_where: Any, **_stream: Any) -> None:
    """Print a warning for a person, who did not write the line of code that it came from."""
    print(f"note: {message}", file=sys.stderr)


def _report_defect(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say that fastvgg itself is wrong, without a traceback unless one was asked for."""
    if "--traceback" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    _tell(
        f"this is a defect: {kind.__name__}: {error}",
        "please report it, with what --traceback adds; what was committed is kept",
    )
    raise SystemExit(DEFECT)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """End a run after the call that writes or syncs; a second signal does not wait for that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _signal, _frame: os._exit(INTERRUPTED))
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; SIGTERM ends a run as Ctrl-C does."""
    warnings.showwarning = _show_warning
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names on disk need not be Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.excepthook = _report_defect
    typer.main.get_command(app)()
