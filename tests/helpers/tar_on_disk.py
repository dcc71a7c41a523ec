"""Tar files, written by tarfile or block by block, and damaged ones."""

from __future__ import annotations

import io
import tarfile

import numpy as np
from PIL import Image

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)


def member(name, content=b"", kind=tarfile.REGTYPE, **fields):
    """Return a TarInfo and the content of a member."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_bytes(members, kind="ustar"):
    """Return a tar of members: pairs of name and content, or results of `member`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind]) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else member(name, content)[0]
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def save_tar(path, members, kind="ustar"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, kind))
    return path


def header(name, size=0, kind=tarfile.REGTYPE, **fields):
    """Return a header block of the GNU format."""
    info, _ = member(name, kind=kind, **fields)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def with_checksum(block, sign="B"):
    """Return a header block with its checksum over unsigned ("B") or signed ("b") bytes."""
    blanked = block[:148] + b" " * 8 + block[156:]
    total = int(np.frombuffer(blanked, "i1" if sign == "b" else "u1").sum(dtype=np.int64))
    return block[:148] + b"%06o\0 " % total + block[156:]


def pad_to_block(content):
    """Append zeros up to a multiple of the block size."""
    return content + bytes(-len(content) % BLOCK_BYTES)


def save_blocks(path, *blocks):
    """Write blocks to a file and return its path."""
    path.write_bytes(b"".join(blocks))
    return path


def png(image):
    """Return an image encoded as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()
