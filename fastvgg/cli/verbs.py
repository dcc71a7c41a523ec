"""The verbs: each is one call of the library."""

import dataclasses
from typing import Annotated

import typer

import fastvgg
from fastvgg import models
from fastvgg.cli.answers import print_json, print_known
from fastvgg.cli.carry import carry_out
from fastvgg.cli.exits import exits
from fastvgg.cli.options import (
    Dask,
    DryRun,
    Dtype,
    Durability,
    Exif,
    FastJpeg,
    Format,
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
    RetryFailed,
    SixteenBit,
    Size,
    Source,
    SourceLayout,
    Strict,
    Target,
    Threads,
    Traceback,
)
from fastvgg.errors import UsageError

__all__ = ["app"]

app = typer.Typer(
    name="fastvgg",
    help="Images to the exact bits that a pretrained network expects, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
    with exits(traceback):
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
        carry_out(plan, dask, dry_run=dry_run, as_json=as_json, quiet=quiet)


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
    with exits(traceback):
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
        carry_out(plan, dask, dry_run=dry_run, as_json=as_json, quiet=quiet)


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
    with exits(traceback):
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
        carry_out(plan, dask, dry_run=dry_run, as_json=as_json, quiet=quiet)


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
    with exits(traceback):
        verification = fastvgg.verify(path, full=full)
        print_json(dataclasses.asdict(verification)) if as_json else print(verification)


@app.command()
def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A dataset, finished or not.")],
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Tell what a dataset is: shape, type, mode, where it came from, how far a run is.

    Example: fastvgg info train.npy
    """
    with exits(traceback):
        from fastvgg.stream.info import info as info_of

        known = info_of(path)
        if as_json:
            print_json(known)
            return
        print_known(known)


@app.command("models")
def models_(as_json: Json = False) -> None:
    """Tell which mode each published model wants.

    Example: fastvgg models
    """
    if as_json:
        print_json(models.MODES_BY_MODEL)
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
    with exits(traceback):
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
