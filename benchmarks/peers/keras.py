"""Keras, on NumPy arrays and on the tensors of its backends."""

from __future__ import annotations

from peers.task import Implementation


def keras_preprocess(task):
    from keras.applications.imagenet_utils import preprocess_input

    def in_place(images, y):
        y[...] = images
        return preprocess_input(y, mode=task.mode.name)

    return Implementation(
        batch=lambda: preprocess_input(task.x, mode=task.mode.name),
        batch_into=lambda: in_place(task.x, task.out),
        image=in_place,
        view=lambda y: y[..., ::-1] if task.mode.is_bgr else y,
    )


def keras_tensor_preprocess(task):
    """Pass Keras a float tensor of its backend, because its arithmetic overflows in uint8."""
    import keras
    from keras.applications.imagenet_utils import preprocess_input

    def preprocess(x):
        y = preprocess_input(keras.ops.cast(x, "float32"), mode=task.mode.name)
        return y.block_until_ready() if keras.backend.backend() == "jax" else y

    def image(x, row):
        row[...] = preprocess(keras.ops.convert_to_tensor(x))

    def set_threads(threads):
        if keras.backend.backend() == "torch":
            import torch

            torch.set_num_threads(threads)

    x = keras.ops.convert_to_tensor(task.x)
    return Implementation(batch=lambda: preprocess(x), image=image, set_threads=set_threads)
