"""A location is parsed once, where user input arrives."""

from __future__ import annotations

import pytest

import fastvgg
from fastvgg.storage.location import Location
from tests.helpers.datasets_on_disk import pixels, save_images, save_npy


@pytest.fixture
def parsed(monkeypatch):
    texts = []
    parse = Location.parse

    def counting(text):
        texts.append(str(text))
        return parse(text)

    monkeypatch.setattr(Location, "parse", counting)
    return texts


@pytest.mark.parametrize("name", ["y.npy", "y.h5::/images", "y.zarr"])
@pytest.mark.parametrize("kind", ["array", "images"])
def test_planning_and_running_parse_each_path_once(tmp_path, parsed, kind, name):
    source, target = tmp_path / "x.npy", f"{tmp_path}/{name}"
    if kind == "array":
        save_npy(source, pixels(5))
    else:
        save_images(source, pixels(5))
    fastvgg.plan(source, target, mode="caffe").run()
    assert parsed == [str(source), target]
    fastvgg.plan(source, target, mode="caffe").run()
    assert parsed == [str(source), target] * 2


def test_verify_parses_the_target_path_and_the_source_path_once(tmp_path, parsed):
    source = save_npy(tmp_path / "x.npy", pixels(5))
    fastvgg.plan(source, tmp_path / "y.npy", mode="caffe").run()
    parsed.clear()
    assert fastvgg.verify(tmp_path / "y.npy").recomputed_images == 5
    assert parsed == [f"{tmp_path}/y.npy", str(source)]
