"""Decode mutated and hostile images within the memory limit, with the real command.

    python -m tests.campaigns.hostile_images              # 500 images, takes minutes; prints counts
    python -m tests.campaigns.hostile_images --size 5000  # number of images

Photographs of scikit-image in every format, and the images of `tests.helpers.hostile_images`, have
bytes changed, removed, repeated or replaced by large numbers. A process packs some of them together
with a good image. The good image is read, each of the others is read or has a reason, the process
neither crashes nor prints a traceback, and its memory stays within the limit and a tenth.
"""

from __future__ import annotations

import random

from PIL import Image

from tests.campaigns.command import main
from tests.helpers.datasets_on_disk import PHOTOGRAPHS
from tests.helpers.hostile_images import hostile_images, run_on_images, saved, tiny_image

SIZE = 500
IMAGES_PER_RUN = 20
MAX_BYTES = 64 * 2**20 * 1.1
MAX_FILE_BYTES = 300_000
NUMBERS = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg")


def photographs():
    """Yield photographs in each format, by name."""
    for name in ("chelsea.png", "rocket.jpg", "camera.png"):
        with Image.open(PHOTOGRAPHS / name) as image:
            small = image.convert("RGB").resize((480, 320))
        stem = name[:-4]
        for suffix, kind in (("png", "png"), ("webp", "webp"), ("bmp", "bmp"), ("ppm", "ppm")):
            yield f"{stem}.{suffix}", saved(kind, small)
        yield f"{stem}.gif", saved("gif", small.quantize(64))
        yield f"{stem}.jp2", saved("jpeg2000", small)
        yield f"{stem}.avif", saved("avif", small, speed=10)
        yield f"{stem}-palette.png", saved("png", small.quantize(64))
        yield f"{stem}-grey.tif", saved("tiff", small.convert("L").convert("I"))
        yield f"{stem}-cmyk.jpg", saved("jpeg", small.convert("CMYK"))
        for progressive in (False, True):
            yield f"{stem}-{progressive}.jpg", saved("jpeg", small, progressive=progressive)
        for compression in TIFF_COMPRESSIONS:
            yield f"{stem}-{compression}.tif", saved("tiff", small, compression=compression)


def mutated(data, draw):
    """Change a few places of a file, mostly near its front, where the sizes and offsets are."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at = int(len(changed) * draw.random() ** draw.choice([1, 1, 2, 4]))
        how = draw.choice([0, 0, 1, 1, 1, 2, 3, 4, 5])
        if how == 0:
            changed[at : at + 1] = bytes([draw.randrange(256)])
        elif how == 1:
            width = draw.choice([1, 2, 4])
            number = draw.choice(NUMBERS) % 256**width
            changed[at : at + width] = number.to_bytes(width, draw.choice(["little", "big"]))
        elif how == 2:
            del changed[at : at + draw.choice([1, 4, 100])]
        elif how == 3:
            changed[at:at] = changed[at : at + draw.choice([1, 12, 500])]
        elif how == 4:
            changed[at : at + draw.choice([2, 30])] = bytes(draw.choice([2, 30]))
        else:
            del changed[at:]
    return bytes(changed)


def campaign(seed, size):
    """Decode `size` mutated images."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    originals = dict(photographs())
    for name, make in hostile_images().items():
        data = make()
        if len(data) <= MAX_FILE_BYTES:
            originals[name] = data
    names = [draw.choice([*originals]) for _ in range(size)]
    images = [(f"{at}-{name}", mutated(originals[name], draw)) for at, name in enumerate(names)]
    idle_bytes = run_on_images({"good.png": tiny_image()}).peak_bytes
    counts = {"images": 0, "read": 0, "failed with a reason": 0}
    largest_bytes = 0
    for first in range(0, size, IMAGES_PER_RUN):
        some = images[first : first + IMAGES_PER_RUN]
        run = run_on_images({"good.png": tiny_image(), **dict(some)})
        used_bytes = run.peak_bytes - idle_bytes
        label = f"seed {seed}: {', '.join(name for name, _ in some)}"
        assert run.code in (0, 1), f"{label}: exit code {run.code}\n{run.stderr}"
        assert "Traceback" not in run.stderr, f"{label}\n{run.stderr}"
        assert used_bytes < MAX_BYTES, f"{label}: {used_bytes} bytes"
        assert run.rows.pop("good.png") == (False, ""), label
        assert run.rows.keys() == {name for name, _ in some}, label
        assert all(reason for failed, reason in run.rows.values() if failed), label
        failed = sum(failed for failed, _ in run.rows.values())
        counts["images"] += len(some)
        counts["read"] += len(some) - failed
        counts["failed with a reason"] += failed
        largest_bytes = max(largest_bytes, used_bytes)
    return {**counts, "largest_kib": largest_bytes >> 10, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=SIZE)
