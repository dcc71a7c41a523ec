"""The peers of images.py, each in a separate process, since their dependencies may conflict.

    python benchmarks/image_peers.py torch photos/ scratch/ 2    # then a line per epoch on stdin

Prints a line of JSON with its versions, or with the reason that it cannot be imported. For every
line on stdin it runs one epoch over the directory of photographs, prints the number of images, and
prints another line when it is idle. fastvgg is not imported: an interpreter with the peer, NumPy
and Pillow is enough.

    python -m pip install torch pillow               # torch
    python -m pip install torch webdataset pillow    # webdataset
    python -m pip install tensorflow-cpu pillow      # tf, keras, loop
    apt-get install libopencv-dev libturbojpeg0-dev pkg-config
    python -m pip install torch numba opencv-python-headless pillow setuptools
    python -m pip install assertpy fastargs pandas psutil pytorch-pfn-extras terminaltables tqdm
    python -m pip install --no-deps --no-build-isolation ffcv    # ffcv

The task is that of fastvgg: batches of float32, 224x224, in torch mode (PyTorch, WebDataset, FFCV)
or in caffe mode (the others). Peers produce them in memory and discard them, so they write nothing.
Startup, compilation, writing shards or FFCV's file, and one warm-up epoch are not timed. Each peer
is used as its documentation shows, on as many cores as fastvgg has threads.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (224, 224)
BATCH = 64
SHARDS_PER_WORKER = 2  # a worker reads whole shards
JPEG_QUALITY = 90  # of FFCV's file, as of the photographs
CAFFE_MEAN = np.array((103.939, 116.779, 123.68), np.float32)
TORCH_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
TORCH_STD = np.array((0.229, 0.224, 0.225), np.float32)
ENVIRONMENT = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}


def list_photographs(photographs):
    return [str(path) for path in sorted(photographs.rglob("*.jpg"))]


def count_images(batches):
    """Consume all batches; return the number of images, and the iterator for later release.

    The release is not timed: tf.data delays it until its next autotuning step, by up to the
    duration of the epoch.
    """
    iterator = iter(batches)
    return sum(int(batch.shape[0]) for batch in iterator), iterator


def torch_input(image):
    """Process a Pillow image as torchvision's Resize, ToTensor and Normalize do.

    Not every build of PyTorch has a matching torchvision that can be imported.
    """
    import torch

    height, width = SIZE
    resized = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    x = torch.from_numpy(np.array(resized, np.uint8, copy=True))
    x = x.permute((2, 0, 1)).contiguous().to(torch.float32).div(255)
    mean, std = (torch.as_tensor(each)[:, None, None] for each in (TORCH_MEAN, TORCH_STD))
    return x.clone().sub_(mean).div_(std)


def torch_epochs(photographs, _scratch, threads):
    """Decode with Pillow in worker processes."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    paths = list_photographs(photographs)

    class Photographs(Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            with Image.open(paths[index]) as image:
                return torch_input(image)

    loader = DataLoader(Photographs(), BATCH, num_workers=threads, persistent_workers=True)
    return {"torch": torch.__version__}, lambda: count_images(loader)


def webdataset_epochs(photographs, scratch, threads):
    """Write the same files into tar shards, which worker processes read, each its own."""
    import torch
    import webdataset

    paths = list_photographs(photographs)
    shards = SHARDS_PER_WORKER * threads
    images_per_shard = math.ceil(len(paths) / shards)
    with webdataset.ShardWriter(
        f"{scratch}/%04d.tar", maxcount=images_per_shard, verbose=0
    ) as writer:
        for row, path in enumerate(paths):
            writer.write({"__key__": f"{row:07d}", "jpg": Path(path).read_bytes()})
    dataset = webdataset.WebDataset(
        [str(path) for path in sorted(scratch.glob("*.tar"))], shardshuffle=False
    )
    dataset = dataset.decode("pil").to_tuple("jpg").map_tuple(torch_input).batched(BATCH)
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=threads, persistent_workers=True
    )
    versions = {"torch": torch.__version__, "webdataset": webdataset.__version__}
    return versions, lambda: count_images(images for (images,) in loader)


def tf_epochs(photographs, _scratch, _threads):
    """Flip the channels with `tf.reverse`, which is twice as fast as a slice."""
    import tensorflow as tf

    def read(path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        x = tf.cast(tf.image.resize(image, SIZE, method="nearest"), tf.float32)
        return tf.reverse(x, [-1]) - CAFFE_MEAN

    dataset = tf.data.Dataset.from_tensor_slices(list_photographs(photographs))
    dataset = dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.batch(BATCH).prefetch(tf.data.AUTOTUNE)
    return {"tensorflow": tf.__version__}, lambda: count_images(dataset)


def keras_epochs(photographs, _scratch, _threads):
    """Use Keras' own loader and preprocessing.

    Nearest-neighbor resizing yields uint8, in which `preprocess_input` would overflow.
    """
    import keras
    import tensorflow as tf

    def preprocess(images):
        return keras.applications.vgg19.preprocess_input(tf.cast(images, tf.float32))

    dataset = keras.utils.image_dataset_from_directory(
        photographs,
        labels=None,
        batch_size=BATCH,
        image_size=SIZE,
        interpolation="nearest",
        shuffle=False,
        verbose=False,
    )
    dataset = dataset.map(preprocess, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.prefetch(tf.data.AUTOTUNE)
    versions = {"keras": keras.__version__, "tensorflow": tf.__version__}
    return versions, lambda: count_images(dataset)


def loop_epochs(photographs, _scratch, _threads):
    """Process one image at a time, in one process, as scripts do."""
    import keras
    from keras.applications.vgg19 import preprocess_input

    def load(path):
        image = keras.utils.load_img(path, target_size=SIZE)
        return preprocess_input(np.expand_dims(keras.utils.img_to_array(image), axis=0))

    paths = list_photographs(photographs)
    return {"keras": keras.__version__}, lambda: count_images(load(path) for path in paths)


def ffcv_epochs(photographs, scratch, threads):
    """Write FFCV's own file of JPEGs, and read it.

    Its decoders resize a crop by area; here the crop is the whole photograph.
    """
    from ffcv.fields import RGBImageField
    from ffcv.fields.decoders import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, ToTensor
    from ffcv.writer import DatasetWriter

    class FullImageDecoder(CenterCropRGBImageDecoder):
        @property
        def get_crop_generator(self):
            def full_image(height, width, _scale, _ratio):
                return 0, 0, height, width

            return full_image

    class Photographs:
        paths = list_photographs(photographs)

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            with Image.open(self.paths[index]) as image:
                return (np.array(image.convert("RGB")),)

    path = str(scratch / "photographs.beton")
    field = RGBImageField(write_mode="jpg", jpeg_quality=JPEG_QUALITY)
    DatasetWriter(path, {"image": field}, num_workers=threads).from_indexed_dataset(Photographs())
    normalize = NormalizeImage(TORCH_MEAN * 255, TORCH_STD * 255, np.float32)
    loader = Loader(
        path,
        BATCH,
        num_workers=threads,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [FullImageDecoder(SIZE, ratio=1), normalize, ToTensor()]},
    )
    versions = {"ffcv": importlib.metadata.version("ffcv")}
    return versions, lambda: count_images(image for (image,) in loader)


EPOCHS = {
    "torch": torch_epochs,
    "webdataset": webdataset_epochs,
    "tf": tf_epochs,
    "keras": keras_epochs,
    "loop": loop_epochs,
    "ffcv": ffcv_epochs,
}


def main():
    name, photographs, scratch, threads = sys.argv[1:]
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # redirect what libraries print
    os.environ.update(ENVIRONMENT)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    try:
        versions, epoch = EPOCHS[name](Path(photographs), Path(scratch), int(threads))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=replies)
        return
    print(json.dumps({"versions": versions}), file=replies)
    for _ in sys.stdin:
        images, iterator = epoch()
        print(json.dumps({"images": images}), file=replies)
        del iterator
        print(json.dumps({"idle": True}), file=replies)


if __name__ == "__main__":
    main()
