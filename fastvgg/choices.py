"""Options with few values: check a value, and suggest the one that was meant."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Final

from fastvgg.errors import UsageError, is_command_line, option

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fastvgg.errors import FastvggError

MIN_SIMILARITY: Final = 0.7  # of words, as difflib measures it: bilinar, not int32 for uint8
# What other libraries call the values of an option; each word is in lower case.
SYNONYMS: Final[Mapping[str, Mapping[str, str]]] = {
    "mode": {
        **dict.fromkeys(("bgr", "keras", "vgg"), "caffe"),
        **dict.fromkeys(("tensorflow", "inception", "mobilenet"), "tf"),
        **dict.fromkeys(("pytorch", "torchvision", "imagenet", "timm", "densenet"), "torch"),
        **dict.fromkeys(("none", "raw", "efficientnet", "convnext"), "identity"),
    },
    "dtype": {
        **dict.fromkeys(("fp16", "f16", "half"), "float16"),
        **dict.fromkeys(("bf16", "brain", "brainfloat16"), "bfloat16"),
        **dict.fromkeys(("fp32", "f32", "float", "single"), "float32"),
        **dict.fromkeys(("fp64", "f64", "double"), "float64"),
        **dict.fromkeys(("u8", "byte"), "uint8"),
    },
    "layout": {
        **dict.fromkeys(("channels_last", "hwc", "bhwc", "interleaved"), "NHWC"),
        **dict.fromkeys(("channels_first", "chw", "bchw", "planar"), "NCHW"),
    },
    "data_format": {
        **dict.fromkeys(("nhwc", "hwc", "last"), "channels_last"),
        **dict.fromkeys(("nchw", "chw", "first"), "channels_first"),
    },
    "format": {"jpg": "jpeg", "tif": "png", "tiff": "png", "bmp": "png", "lossless": "png"},
    "interpolation": {
        "linear": "bilinear",
        "cubic": "bicubic",
        **dict.fromkeys(("area", "average", "mean"), "box"),
        **dict.fromkeys(("lanczos3", "lanczos5", "antialias"), "lanczos"),
        **dict.fromkeys(("nn", "none", "nearest-exact"), "nearest"),
    },
    "rounding": {
        **dict.fromkeys(("round", "even", "half-even"), "nearest"),
        **dict.fromkeys(("trunc", "floor", "astype"), "truncate"),
    },
    "backend": {"jit": "numba", "np": "numpy", "cpu": "auto"},
    "direction": {"deprocess": "restore", "inverse": "restore"},
}


def check_choice(
    name: str,
    value: object,
    choices: Iterable[str],
    *,
    error: type[FastvggError] = UsageError,
    other: str = "",
) -> str:
    """Check that an option has one of its values, and return it.

    `other` says what else a Python caller may give.

    Raises
    ------
    FastvggError
        Of the class `error`. It names the value that was probably meant, and all values.

    Examples
    --------
    >>> check_choice("dtype", "fp16", ["float16", "float32"])
    Traceback (most recent call last):
    fastvgg.errors.UsageError: unknown dtype 'fp16'
    did you mean dtype='float16'? give one of 'float16', 'float32'
    """
    known = list(choices)
    if isinstance(value, str) and value in known:  # comparing an array gives an array
        return value
    written = ", ".join(known if is_command_line() else map(repr, known))
    remedy = f"give one of {written}{'' if is_command_line() else other}"
    meant = suggest(name, value, known)
    if meant is not None:
        remedy = f"did you mean {option(name, meant)}? {remedy}"
    raise error(f"unknown {name.replace('_', ' ')} {value!r}", remedy)


def check_flags(**flags: object) -> None:
    """Check that options which are on or off are True or False.

    Python takes any object for a truth value, also the string "no".
    """
    for name, value in flags.items():
        if type(value).__name__ not in ("bool", "bool_"):  # also NumPy's, without importing it
            raise UsageError(f"{name} is {value!r}", "give True or False")


def suggest(name: str, value: object, choices: Iterable[str]) -> str | None:
    """Return the choice that was probably meant by `value`, or None.

    That is one that differs in case, spaces and dashes only, or that other libraries call so, or
    that is spelled alike.

    >>> suggest("layout", "channels_first", ["NHWC", "NCHW"]), suggest("format", "JPG", ["jpeg"])
    ('NCHW', 'jpeg')
    >>> suggest("interpolation", "bilinar", ["bilinear", "box"]), suggest("mode", "", ["tf"])
    ('bilinear', None)
    """
    by_word = {normalize(choice): choice for choice in choices}
    text = str(value).removeprefix("torch.").strip()
    if normalize(text) in by_word:
        return by_word[normalize(text)]
    synonym = SYNONYMS.get(name.removeprefix("out_"), {}).get(text.lower())
    if synonym is not None and normalize(synonym) in by_word:
        return by_word[normalize(synonym)]
    matches = difflib.get_close_matches(normalize(text), by_word, n=1, cutoff=MIN_SIMILARITY)
    return by_word[matches[0]] if matches else None


def normalize(text: str) -> str:
    """Return a word without what people write differently: case, dashes, underscores and spaces."""
    return text.lower().replace("-", "").replace("_", "").replace(" ", "")
