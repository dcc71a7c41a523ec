"""Lines of JSON with checksums: the format of the journal and the redo log.

A line is the xxh3 of its text, a space, the text and a line feed. The checksum detects a line that
a crash truncated.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash


def decode_line(line: bytes) -> dict[str, Any] | None:
    """Decode a line of `encode_line`; return None if it is truncated or its checksum is wrong.

    Raises
    ------
    ValueError
        If the checksum is valid but the text is not a JSON object.
    """
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum.decode("latin-1") != xxhash.xxh3_64_hexdigest(text):
        return None
    try:
        fields = json.loads(text)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object but {type(fields).__name__}")  # noqa: TRY004
    return fields


def encode_line(fields: dict[str, Any]) -> bytes:
    """Encode a JSON object as a line that starts with the checksum of the rest."""
    text = json.dumps(fields).encode()
    return f"{xxhash.xxh3_64_hexdigest(text)} ".encode() + text + b"\n"
