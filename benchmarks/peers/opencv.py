"""OpenCV, and Albumentations, which uses it."""

from __future__ import annotations

import numpy as np

from peers.task import Implementation, torch_constants


def opencv_blob(layout):
    def build(task):
        import cv2

        parameters = cv2.dnn.Image2BlobParams()
        parameters.datalayout = getattr(cv2, f"DNN_LAYOUT_{layout}")
        parameters.swapRB = task.mode.is_bgr
        if task.mode.is_bgr:
            parameters.mean = task.mode.mean
        else:
            parameters.mean = tuple(task.mode.divide * mean for mean in task.mode.mean)
            parameters.scalefactor = tuple(1 / (task.mode.divide * std) for std in task.mode.std)

        def view(y):
            images, height, width, channels = y.shape
            return y.reshape(images, channels, height, width) if layout == "NCHW" else y

        def image(x, row):
            cv2.dnn.blobFromImageWithParams(x, view(row[np.newaxis]), parameters)

        images, out = list(task.x), view(task.out)
        return Implementation(
            batch=lambda: cv2.dnn.blobFromImagesWithParams(images, param=parameters),
            batch_into=lambda: cv2.dnn.blobFromImagesWithParams(images, out, parameters),
            image=image,
            view=view,
            set_threads=cv2.setNumThreads,
        )

    return build


def opencv_preprocess(task):
    import cv2

    mean = (*task.mode.mean, 0.0)

    def subtract(x, row):
        flipped = cv2.cvtColor(x, cv2.COLOR_RGB2BGR)
        cv2.subtract(flipped, mean, row, dtype=cv2.CV_32F)

    if task.mode.is_bgr:
        return Implementation(image=subtract, set_threads=cv2.setNumThreads)
    divide, mean, std = torch_constants(task.mode)
    table = (np.arange(256, dtype=np.float32)[None, :, None] / divide - mean) / std
    return Implementation(
        image=lambda x, row: cv2.LUT(x, table, row), set_threads=cv2.setNumThreads
    )


def opencv_restore(task):
    import cv2

    mean = (*task.mode.mean, 0.0)

    def image(y, row):
        cv2.cvtColor(cv2.add(y, mean, dtype=cv2.CV_8U), cv2.COLOR_BGR2RGB, row)

    return Implementation(image=image, set_threads=cv2.setNumThreads)


def albumentations_preprocess(task):
    import albumentations
    import cv2

    if task.mode.is_bgr:
        normalize = albumentations.Normalize(task.mode.mean, (1, 1, 1), max_pixel_value=1.0)
    else:
        normalize = albumentations.Normalize(task.mode.mean, task.mode.std, task.mode.divide)

    def image(x, row):
        ordered = cv2.cvtColor(x, cv2.COLOR_RGB2BGR) if task.mode.is_bgr else x
        row[...] = normalize(image=ordered)["image"]

    def batch():
        return normalize(images=task.x[..., ::-1] if task.mode.is_bgr else task.x)["images"]

    return Implementation(batch=batch, image=image, set_threads=cv2.setNumThreads)
