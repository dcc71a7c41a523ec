"""Limits of image datasets: decoding or encoding only, or while writing files."""

from __future__ import annotations

import functools
import io
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import simplejpeg
from PIL import Image
from streams import publish, write

from fastvgg.stream.commit_pipeline import CommitPipeline

IMAGES_PER_TASK = 8
MAX_PENDING = 2  # chunks
ENCODERS = {"png": ".png", "jpeg": ".jpg"}


def process_in_chunks(process, items, threads, chunk_items):
    """Process all items on threads; yield after each chunk of `chunk_items` items.

    Threads wait neither for each other nor for the consumer.
    """

    def process_range(first, stop):
        for index in range(first, stop):
            process(items[index])

    count = len(items)
    with ThreadPoolExecutor(threads) as pool:
        chunks = [
            [
                pool.submit(process_range, first, min(first + IMAGES_PER_TASK, stop))
                for first in range(start, stop, IMAGES_PER_TASK)
            ]
            for start in range(0, count, chunk_items)
            for stop in [min(start + chunk_items, count)]
        ]
        for chunk in chunks:
            for future in chunk:
                future.result()
            yield


def decode_in_chunks(photographs, threads, chunk_images):
    """Read and decode all photographs into a reused buffer per thread."""
    memory = threading.local()
    nbytes = photographs.shape[0] * photographs.shape[1] * 3

    def decode(read):
        if not hasattr(memory, "pixels"):
            memory.pixels = bytearray(nbytes)
        simplejpeg.decode_jpeg(read(), "RGB", buffer=memory.pixels)

    return process_in_chunks(decode, photographs.readers, threads, chunk_images)


def decode(photographs, threads):
    """Read and decode all photographs and discard them."""
    for _ in decode_in_chunks(photographs, threads, len(photographs.readers)):
        pass


def decode_and_write(photographs, path, plan, buffer):
    """Read and decode all photographs while writing a new file from one buffer, as in a run."""
    nbytes = plan.write_bytes - plan.write_bytes % mmap.PAGESIZE
    chunks = decode_in_chunks(photographs, plan.threads, plan.chunk_images)
    with publish(path, nbytes) as file, CommitPipeline() as pipeline:
        for number, _ in enumerate(chunks):
            offset = number * len(buffer)
            data = buffer[: nbytes - offset]
            for _ in pipeline.drain(MAX_PENDING):
                pass
            pipeline.submit(
                functools.partial(write, file, data, offset), functools.partial(os.fsync, file)
            )
        for _ in pipeline.drain(0):
            pass


def encode(pixels, image_format):
    """Encode an image as a restoring run does."""
    if image_format == "jpeg":
        return simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444")
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


def encode_all(images, image_format, threads):
    """Encode images and discard the results."""
    for _ in process_in_chunks(
        functools.partial(encode, image_format=image_format), images, threads, len(images)
    ):
        pass


def encode_and_write(images, image_format, threads, path):
    """Encode images and write their files on threads, and sync the disk at the end."""
    path.mkdir()
    suffix = ENCODERS[image_format]

    def encode_into_file(row):
        data = encode(images[row], image_format)
        file = os.open(f"{path}/{row:08d}{suffix}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write(file, data, 0)
        finally:
            os.close(file)

    for _ in process_in_chunks(encode_into_file, range(len(images)), threads, len(images)):
        pass
    os.sync()
