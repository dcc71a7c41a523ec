"""A user program for type checkers: every intended error has a `type: ignore` comment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import fastvgg
from fastvgg.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def in_memory() -> None:
    x = np.zeros((2, 4, 4, 3), np.uint8)
    y = fastvgg.preprocess(x, "caffe", out_layout="NCHW", dtype="float16", threads=1)
    fastvgg.restore(y, fastvgg.Mode.CAFFE, layout="NCHW", rounding="truncate")
    transform = fastvgg.Transform(fastvgg.Mode("mine", divide=255.0, order="BGR"))
    transform.inverse()(transform(x))
    fastvgg.preprocess(x, "caffe", layout="NWHC")  # type: ignore[call-overload]
    fastvgg.restore(y, "caffe", rounding="up")  # type: ignore[call-overload]
    fastvgg.preprocess(x, "caffe", thread=1)  # type: ignore[call-overload]
    fastvgg.Transform("caffe", layout="HWC")  # type: ignore[arg-type]
    fastvgg.Mode("mine", order="RBG")  # type: ignore[arg-type]
    fastvgg.presto  # type: ignore[attr-defined]  # noqa: B018


def on_disk(source: str, target: str) -> tuple[float, list[str]]:
    plan = fastvgg.plan(source, target, mode="tf", size=(224, 224), memory="1GiB")
    report = plan.run()
    failed: int = report.counts["failed"]
    for images, labels, rows in fastvgg.batches(target, 256, labels=range(1000)):
        images.sum() + rows.sum()
        labels.sum()  # type: ignore[union-attr]  # a dataset may have no labels
    fastvgg.keras.preprocess_input(np.zeros((2, 4, 4, 3)))
    fastvgg.keras.preprocess_inputs  # type: ignore[attr-defined]  # noqa: B018
    fastvgg.verify(target, full=failed == 0)
    report.count  # type: ignore[attr-defined]  # noqa: B018
    fastvgg.plan(source, target, fsync="never")  # type: ignore[arg-type]
    return report.seconds, report.notes


def refused() -> str:
    try:
        in_memory()
    except ShapeError as error:
        return error.remedy
    except fastvgg.FastvggError as error:
        return error.problem
    return fastvgg.__version__


def precise() -> None:
    x = np.zeros((4, 4, 3), np.uint8)
    y = fastvgg.preprocess(x, "caffe")
    y.shapes  # type: ignore[attr-defined]  # noqa: B018  # an array, not Any
    image = fastvgg.restore(np.zeros((4, 4, 3), np.float32), "caffe")
    as_floats: NDArray[np.float32] = image  # type: ignore[assignment]  # uint8
    as_floats.sum()
