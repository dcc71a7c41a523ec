"""Random corruption of files: of bytes, and of JSON fields."""

from __future__ import annotations

import copy
import io
import json
import math

import xxhash

RUN = "0" * 16

# Damage to bytes


def truncate(random, content):
    del content[random.randrange(len(content)) :]


def flip(random, content):
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)


def set_byte(random, content):
    content[random.randrange(len(content))] = random.randrange(256)


def insert(random, content):
    at = random.randrange(len(content))
    content[at:at] = random.choice(TOKENS)


def overwrite(random, content):
    at, token = random.randrange(len(content)), random.choice(TOKENS)
    content[at : at + len(token)] = token


def delete(random, content):
    at = random.randrange(len(content))
    del content[at : at + random.randint(1, 9)]


def repeat(random, content):
    begin, at = random.randrange(len(content)), random.randrange(len(content))
    content[at:at] = content[begin : begin + random.randint(1, 99)]


def change_digit(random, content):
    """Change the next digit after a random offset."""
    start = random.randrange(len(content))
    for at in range(start, min(len(content), start + 200)):
        if 48 <= content[at] < 58:
            content[at] = random.choice(b"0123456789-.e")
            return


def append(random, content):
    content += random.choice(TOKENS)


EDITS = (
    *(truncate, flip, flip, set_byte, insert, insert, overwrite),
    *(delete, repeat, change_digit, change_digit, append),
)
TOKENS = [
    *(b"\0", b"\0" * 64, b"\xff", b"\xc3(", b"\xed\xa0\x80", "\u0663".encode(), b"\xef\xbb\xbf"),
    *(b"\n", b"\r", b"\r\n", b"\t", b"\x0c", b"\x1b[2J", b" ", b" " * 64, b"#", b"\\", b"\\d"),
    *(b"-", b"+", b"--", b"0", b"1", b"9" * 30, b"9" * 5000, b"0x", b"0xf" + b"f" * 999, b"L"),
    *(b"1e999", b"-1e999", b".", b"e", b"j", b"+1j", b"1" + b"0" * 400 + b"+1j", b"_", b"1or 2"),
    *(b"NaN", b"Infinity", b"-Infinity", b"true", b"True", b"null", b"None", b"False", b"false"),
    *(b"(", b")", b"[", b"]", b"{", b"}", b"[" * 90, b"(" * 300, b"{1:" * 99, b"[" * 5000),
    *(b"1," * 3000, b"[]," * 2000, b"-" * 3000, b"{1:{}}," * 999, b"'a' " * 999, b"1+1j," * 999),
    *(b"'", b'"', b",", b":", b"{}", b"[]", b"()", b"'''", b'""', b"*", b"**", b"if ", b"lambda:"),
    *(b'"chunk": -1, ', b'"chunk": 1, ', b"'descr': '|O', ", b"'shape': (1, 1, 1, 3), "),
]


def damaged(random, intact):
    """Apply one to four random edits to a file's content."""
    content = bytearray(intact)
    for _ in range(random.randint(1, 4)):
        if content:
            random.choice(EDITS)(random, content)
    return bytes(content)


def truncations_and_bit_flips(random, files):
    """Yield every truncation and every single bit flip of some files, in random order."""
    mutations = [
        (intact, at, bit)
        for intact in files
        for at in range(len(intact))
        for bit in (None, *range(8))
    ]
    random.shuffle(mutations)
    for intact, at, bit in mutations:
        if bit is None:
            yield intact[:at]
        else:
            yield intact[:at] + bytes([intact[at] ^ 1 << bit]) + intact[at + 1 :]


def interleave_inputs(random, plain, generate):
    """Yield all of `plain`, each after a random number of generated inputs; then only generated."""
    for content in plain:
        while random.random() < 0.5:
            yield generate()
        yield content
    while True:
        yield generate()


# Damage to fields

HUGE, DEEP = "<huge>", "<deep>"
NAMES = [
    *("NHWC", "NCHW", "uint8", "float16", "bfloat16", "float32", "float64", "<f4", "|O", "f4,f4"),
    *("preprocess", "restore", "nearest", "truncate", "box"),
    *("RGB", "BGR", "caffe", "npy", "images"),
]
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 4, 5, 2**31, 2**48, 2**48 + 1, 2**63 - 1, 2**63, 2**64),
    *(-(2**63), 10**400, HUGE, 0.0, -0.0, 0.5, 1.0, 5.0, 1e-46, 1e39, 1e308, math.inf, -math.inf),
    *(math.nan, "", "x", "1", "\0", "\n", "\x1b[2J", "\ud800", "\u0663", "a" * 5000, RUN),
    *([], [1], [0, 0, 0, 0], [5, 7, 9, 3], [True, 7, 9, 3], [5, 7, 9], [1.0] * 3, ["1"] * 3, [[]]),
    *({}, {"a": 1}, {"chunk": 0}, [{}], DEEP, [DEEP]),
]


def replacement(random, value):
    """Return a random replacement for a value, of the same or of another type."""
    if random.random() < 0.4:
        return copy.deepcopy(random.choice(VALUES))
    if isinstance(value, bool):
        return random.choice([not value, int(value), str(value)])
    if isinstance(value, int):
        near = [value + 1, value - 1, -value - 1, value * 2, value + 2**40, value * 2**70]
        return random.choice([*near, random.choice([bool(value), str(value), [value]])])
    if isinstance(value, float):
        return random.choice([-value, 2 * value, str(value), True, [value], math.nan])
    if isinstance(value, str):
        return random.choice([value[:-1], value + "0", value.upper(), [value], *NAMES])
    if isinstance(value, list):
        return random.choice(
            [value[:-1], value[::-1], [*value, 0], value * 2, [value], [*value, []]]
        )
    return random.choice([0, "", {}, [], False, list(value or ())])


def random_location(random, fields):
    """Return a random object or list in the fields, and one of its keys."""
    while True:
        key = random.choice(list(fields) if isinstance(fields, dict) else range(len(fields)))
        if not isinstance(fields[key], dict | list) or not fields[key] or random.random() < 0.15:
            return fields, key
        fields = fields[key]


def integer_locations(fields):
    """Yield the location of every integer, as an object or list and a key."""
    for key, value in fields.items() if isinstance(fields, dict) else enumerate(fields):
        if isinstance(value, dict | list):
            yield from integer_locations(value)
        elif isinstance(value, int):
            yield fields, key


def change_number_type(random, fields):
    """Replace an integer by an equal value of another type (bool or float)."""
    locations = list(integer_locations(fields))
    if locations:
        container, key = random.choice(locations)
        value = container[key]
        container[key] = bool(value) if value in (0, 1) else float(value) if value < 2**53 else 1.0


def change_field(random, fields):
    """Change, remove or insert a random field; `fields` must not be empty."""
    if random.random() < 0.15:
        change_number_type(random, fields)
        return
    container, key = random_location(random, fields)
    roll = random.random()
    if roll < 0.75:
        container[key] = replacement(random, container[key])
    elif roll < 0.85:
        del container[key]
    elif isinstance(container, dict):
        container[random.choice([*container, "x", "fastvgg-journal", "size"])] = container[key]
    else:
        container.insert(key, replacement(random, container[key]))


def corrupt_json(random, text):
    """Return JSON with one to three changed fields, or with a duplicate key."""
    fields = json.loads(text)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        if fields:
            change_field(random, fields)
    changed = json.dumps(fields, indent=random.choice([None, None, None, 1]))
    if HUGE in changed:
        changed = changed.replace(f'"{HUGE}"', "9" * 5000)
    if DEEP in changed:
        depth = random.choice([50, 400, 900, 980, 5000, 50_000])
        changed = changed.replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    roll = random.random()
    if roll < 0.05:
        duplicate = random.choice(['"chunk": -1', '"job": {}', '"chunk_images": 0', '"chunks": 99'])
        changed = changed.replace("{", "{" + duplicate + ", ", 1)
    if roll > 0.98:
        return changed.encode("utf-16")
    return damaged(random, changed.encode()) if 0.1 < roll < 0.2 else changed.encode()


def line_with_checksum(text):
    """Return a line preceded by its checksum."""
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def valid_prefix_bytes(content):
    """Return the length of the longest prefix of a journal whose lines are complete and valid."""
    length = 0
    for line in io.BytesIO(content):
        if not line.endswith(b"\n") or line != line_with_checksum(line[17:-1]):
            break
        length += len(line)
    return length
