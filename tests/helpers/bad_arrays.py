"""Invalid .npy files and the words that their error messages must contain."""

from __future__ import annotations

import struct

SHAPE = (5, 7, 9, 3)
MAX_HEADER_BYTES = 10_000


def header_text(descr="'<f4'", fortran="False", shape="(5, 7, 9, 3)", extra=""):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, {extra}}}"


def npy_of(text, version=(1, 0), data=b"\0" * (5 * 7 * 9 * 3 * 4)):
    """Return a .npy file with `text` as its header, padded as numpy.save pads it."""
    encoded = text if isinstance(text, bytes) else text.encode("utf-8")
    prefix = 10 if version == (1, 0) else 12
    encoded += b" " * (-(prefix + len(encoded) + 1) % 64) + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(encoded))
    return b"\x93NUMPY" + bytes(version) + length + encoded + data


# Defect -> (content, words that the message must contain).
VALID = npy_of(header_text())
INVALID = {
    "one byte short": (VALID[:-1], ["truncated", len(VALID), len(VALID) - 1, SHAPE]),
    "half": (VALID[: len(VALID) // 2], ["truncated", len(VALID), len(VALID) // 2]),
    "only a header": (VALID[:128], ["truncated", len(VALID), "128"]),
    "cut in its header": (VALID[:77], ["ends after 77 bytes", "118"]),
    "cut after its length": (VALID[:12], ["ends after 12 bytes", "118"]),
    "cut in its length": (VALID[:9], ["not a .npy file"]),
    "empty": (b"", ["is empty"]),
    "one byte long": (VALID[:1], ["not a .npy file"]),
    "one byte too many": (VALID + b"\0", ["followed by extra bytes", len(VALID), len(VALID) + 1]),
    "two arrays": (VALID + VALID, ["followed by extra bytes", len(VALID), 2 * len(VALID)]),
    "text": (b"row,path,label\n0,a.jpg,\n", ["not a .npy file", "row,pa"]),
    "a png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, ["is a single image", "directory"]),
    "a zip": (b"PK\x03\x04" + b"\0" * 100, ["is a zip archive"]),
    "version 9.9": (npy_of(header_text(), (9, 9)), ["9.9", "1.0, 2.0 and 3.0"]),
    "version 1.1": (npy_of(header_text(), (1, 1)), ["1.1"]),
    "objects": (npy_of(header_text("'|O'")), ["pickled Python objects"]),
    "Fortran order": (npy_of(header_text(fortran="True")), ["Fortran order", "ascontiguousarray"]),
    "big-endian": (npy_of(header_text("'>f4'")), ["big-endian", ">f4", "newbyteorder"]),
    "big-endian halves": (npy_of(header_text("'>f2'")), ["big-endian", ">f2"]),
    "big-endian integers": (npy_of(header_text("'>i4'")), ["unsupported dtype", ">i4"]),
    "big-endian bfloat16": (npy_of(header_text("'>V2'")), ["unsupported dtype", ">V2"]),
    "an alias that NumPy warns of": (npy_of(header_text("'a3'")), ["unsupported dtype", "a3"]),
    "a structure in a code": (npy_of(header_text("'f4,f4'")), ["f4,f4"]),
    "a structure": (npy_of(header_text("[('r', '<f4'), ('g', '<f4')]")), ["('r', '<f4')"]),
    "a subarray": (npy_of(header_text("('<f4', (3,))")), ["('<f4', (3,))"]),
    "strings": (npy_of(header_text("'<U1'")), ["<U1", "float32"]),
    "bytes": (npy_of(header_text("'|S4'")), ["|S4"]),
    "complex numbers": (npy_of(header_text("'<c8'")), ["<c8", "float32"]),
    "int32": (npy_of(header_text("'<i4'")), ["<i4", "uint8"]),
    "signed bytes": (npy_of(header_text("'|i1'")), ["|i1"]),
    "booleans": (npy_of(header_text("'|b1'")), ["|b1"]),
    "dates": (npy_of(header_text("'<M8[s]'")), ["<M8[s]"]),
    "four unnamed bytes": (npy_of(header_text("'<V4'")), ["<V4"]),
    "nothing unnamed": (npy_of(header_text("'|V0'")), ["|V0"]),
    "bfloat16 without a manifest": (
        npy_of(header_text("'<V2'"), data=b"\0" * 1890),
        ["two-byte elements", "bfloat16", "manifest"],
    ),
    "no images": (npy_of(header_text(shape="(0, 7, 9, 3)"), data=b""), ["(0, 7, 9, 3)"]),
    "no height": (npy_of(header_text(shape="(5, 0, 9, 3)"), data=b""), ["(5, 0, 9, 3)"]),
    "no channels": (npy_of(header_text(shape="(5, 7, 9, 0)"), data=b""), ["(5, 7, 9, 0)"]),
    "one image of rank 3": (
        npy_of(header_text(shape="(7, 9, 3)"), data=b"\0" * 756),
        ["(7, 9, 3)", "rank 3", "numpy.newaxis"],
    ),
    "rank 5": (npy_of(header_text(shape="(1, 5, 7, 9, 3)")), ["rank 5"]),
    "rank 0": (npy_of(header_text(shape="()"), data=b"\0" * 4), ["rank 0"]),
    "a negative length": (npy_of(header_text(shape="(-5, 7, 9, 3)")), ["(-5, 7, 9, 3)"]),
    "two negative lengths": (npy_of(header_text(shape="(-5, -7, 9, 3)")), ["(-5, -7, 9, 3)"]),
    "a boolean length": (npy_of(header_text(shape="(True, 7, 9, 3)")), ["(True, 7, 9, 3)"]),
    "a fractional length": (npy_of(header_text(shape="(5.0, 7, 9, 3)")), ["(5.0, 7, 9, 3)"]),
    "a length in words": (npy_of(header_text(shape="('5', 7, 9, 3)")), ["('5', 7, 9, 3)"]),
    "a list for a shape": (npy_of(header_text(shape="[5, 7, 9, 3]")), ["wrong types"]),
    "a number for a shape": (npy_of(header_text(shape="945")), ["wrong types"]),
    "a number for an order": (npy_of(header_text(fortran="0")), ["wrong types"]),
    "2**48 images": (npy_of(header_text(shape=f"({2**48}, 7, 9, 3)")), [2**48, 2**48 * 756 + 128]),
    "more than 2**63 bytes": (npy_of(header_text(shape=f"({2**40}, {2**40}, 9, 3)")), [2**40]),
    "sizes that wrap to 0": (npy_of(header_text(shape=f"({2**32}, {2**32}, 2, 3)")), [2**32]),
    "an axis over 2**64": (npy_of(header_text(shape=f"({2**64}, 7, 9, 3)")), [2**64]),
    "an axis of 5000 hex digits": (npy_of(header_text(shape=f"(0x{'f' * 5000}, 7, 9, 3)")), []),
    "a type of 5000 hex digits": (npy_of(header_text(descr=f"0x{'f' * 5000}")), []),
    "65 axes": (npy_of(header_text(shape=str((1,) * 65))), ["rank 65"]),
    "a header of 4 GiB": (
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 16) + b"{}",
        [2**32 - 16, MAX_HEADER_BYTES],
    ),
    "a header just too long": (
        npy_of(header_text(extra=" " * (MAX_HEADER_BYTES + 1))),
        ["claims a header of", MAX_HEADER_BYTES],
    ),
    "nested parentheses": (npy_of("(" * 3000 + ")" * 3000), ["cannot be read"]),
    "nested lists": (npy_of("[" * 90 + "]" * 90), ["exactly descr, fortran_order and shape"]),
    "a long sum": (npy_of("1" + "+1" * 4000), ["cannot be read"]),
    "many signs": (npy_of("-" * 5000 + "1"), ["cannot be read"]),
    "a number of 5000 digits": (npy_of(header_text(shape=f"({'9' * 5000}, 7, 9, 3)")), []),
    "an unhashable key": (npy_of("{[]: 1}"), ["cannot be read"]),
    "a call": (npy_of(header_text(shape="__import__('os').getpid()")), ["cannot be read"]),
    "a zero byte": (npy_of(header_text() + "\0"), ["cannot be read"]),
    "bytes that are not text": (npy_of(header_text().encode() + b"\xff"), ["cannot be read"]),
    "a backslash": (npy_of(header_text(r"'\d'")), []),
    "no header text": (npy_of(""), ["cannot be read"]),
    "an extra key": (npy_of(header_text(extra="'x': 1")), ["exactly"]),
    "a missing key": (npy_of("{'descr': '<f4', 'shape': (5, 7, 9, 3)}"), ["exactly"]),
    "a list": (npy_of("['descr', 'fortran_order', 'shape']"), ["exactly"]),
}
