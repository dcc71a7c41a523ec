"""Find what differs between two jobs, and write it with the options as the caller writes them."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from fastvgg.errors import is_command_line, option, option_name

# The option that determines a field of a job's record. A result has the value that a transform
# leaves to a default, so its fields come later and replace those of the transform.
OPTIONS: Final[dict[tuple[str, str], str]] = {
    ("source", "layout"): "layout",
    ("transform", "layout"): "layout",
    ("transform", "out_layout"): "out_layout",
    ("transform", "dtype"): "dtype",
    ("transform", "rounding"): "rounding",
    ("result", "dtype"): "dtype",
    ("result", "layout"): "out_layout",
    ("result", "in_place"): "in_place",
    ("result", "format"): "format",
}
FINGERPRINT: Final = "fingerprint of the source's content"
PROPERTIES: Final[dict[tuple[str, str], str]] = {
    ("source", "path"): "source",
    ("source", "fingerprint"): FINGERPRINT,
    ("source", "kind"): "format of the source",
    ("source", "shape"): "shape of the source",
    ("source", "dtype"): "dtype of the source",
    ("transform", "direction"): "direction",
    ("result", "kind"): "format of the target",
    ("result", "dataset"): "dataset in the file",
}
ON_BY_DEFAULT: Final = ("follow_links",)  # a command line only turns these off
DERIVED: Final = ("result", "shape")  # follows from the source, its size and the layouts


class Difference(NamedTuple):
    """An option, or a property, that differs between two jobs."""

    name: str
    then: Any
    """A JSON value, as is `now`."""
    now: Any
    text: str

    def __str__(self) -> str:
        return self.text


def find_differences(then: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """Return every field in which two records of `Job.to_dict` differ, by name.

    Only those of the source and the direction, if they differ: a command has other options then.
    """
    found: dict[str, Difference] = {}
    has_same_options = (then["transform"]["direction"], then["source"]["kind"]) == (
        now["transform"]["direction"],
        now["source"]["kind"],
    )
    for section in now:
        for key in then[section].keys() | now[section].keys():
            before, after = then[section].get(key), now[section].get(key)
            if before == after or (section, key) == DERIVED:
                continue
            if (section, key) in PROPERTIES:
                name = PROPERTIES[section, key]
                text = f"{name} {before!r} then, {after!r} now"
                if name == FINGERPRINT:  # a hash tells nothing to its reader
                    text = "another content of the source"
            elif not has_same_options:
                continue
            elif key == "mode":
                name, text = key, _describe_modes(before, after)
            else:  # an option of decoding has its own name in the record
                name = OPTIONS.get((section, key), key)
                text = f"{_write(name, before)} then, {_write(name, after)} now"
            found[name] = Difference(name, before, after, text)
    return [found[name] for name in sorted(found)]


def describe_differences(differences: list[Difference], participle: str) -> str:
    """Return that a run was started, or a target made, otherwise; `participle` is which.

    >>> content = Difference(FINGERPRINT, "b3ba", "4271", "another content of the source")
    >>> describe_differences([content], "made")
    'made before its source changed'
    """
    if [each.name for each in differences] == [FINGERPRINT]:
        return f"{participle} before its source changed"
    return f"{participle} with other settings: {'; '.join(map(str, differences))}"


def as_details(differences: list[Difference]) -> dict[str, Any]:
    """Return differences as the details of an error."""
    return {"settings": {each.name: {"then": each.then, "now": each.now} for each in differences}}


def _describe_modes(before: dict[str, Any], after: dict[str, Any]) -> str:
    if before["name"] != after["name"]:
        names = before["name"], after["name"]
        return f"{option('mode', names[0])} then, {option('mode', names[1])} now"
    return "; ".join(
        f"{name} of the mode {before[name]!r} then, {after[name]!r} now"
        for name in before
        if before[name] != after[name]
    )


def _write(name: str, value: Any) -> str:  # noqa: ANN401  # any JSON value
    """Write an option with its value, or that it is omitted."""
    is_flag = isinstance(value, bool) and is_command_line()
    if is_flag and value is (name in ON_BY_DEFAULT):
        return f"no {option(name, not value)}"
    if value is None:
        return f"no {option_name(name)}"
    return option(name, tuple(value) if isinstance(value, list) else value)
