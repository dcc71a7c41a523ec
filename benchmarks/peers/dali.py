"""DALI, on the CPU."""

from __future__ import annotations

import numpy as np

from peers.task import Implementation, means


def build_pipeline(task, graph):
    """Build a pipeline that reads the batch without a copy and returns one of DALI's buffers."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(
        batch_size=len(task.x),
        num_threads=task.threads,
        device_id=None,
        prefetch_queue_depth=1,
        exec_pipelined=False,
        exec_async=False,
        exec_dynamic=False,  # reuses buffers between calls
    )
    with pipeline:
        pipeline.set_outputs(graph(fn.external_source(lambda: task.x, no_copy=True, layout="HWC")))
    pipeline.build()

    def run_pipeline():
        (result,) = pipeline.run()
        return result.as_tensor()

    return Implementation(batch_into=run_pipeline)


def dali_preprocess(task, *, flips=True):
    from nvidia.dali import fn, types

    flips = flips and task.mode.is_bgr
    scale = task.mode.divide or 1.0
    mean = means(task.mode) if flips else means(task.mode, backwards=True)

    def graph(x):
        if flips:
            x = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.BGR)
        return fn.crop_mirror_normalize(
            x,
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=(scale * mean.astype(float)).tolist(),
            std=[scale * std for std in task.mode.std or (1.0, 1.0, 1.0)],
        )

    return build_pipeline(task, graph)


def dali_preprocess_without_flip(task):
    if not task.mode.is_bgr:
        return Implementation()  # same as dali_preprocess
    with_flip = dali_preprocess(task, flips=False)
    return Implementation(batch_into=lambda: np.asarray(with_flip.batch_into())[..., ::-1])


def dali_restore(task):
    from nvidia.dali import fn, types

    def graph(y):
        bgr = fn.crop_mirror_normalize(
            y, dtype=types.UINT8, output_layout="HWC", mean=[-mean for mean in task.mode.mean]
        )
        return fn.color_space_conversion(bgr, image_type=types.BGR, output_type=types.RGB)

    return build_pipeline(task, graph)
