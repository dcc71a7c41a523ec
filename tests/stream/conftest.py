"""Fixtures: a stored array and a folder of images."""

from __future__ import annotations

import pytest

from tests.helpers.datasets_on_disk import pixels, save_images, save_npy


@pytest.fixture
def array(tmp_path):
    return save_npy(tmp_path / "x.npy", pixels(11))


@pytest.fixture
def photos(tmp_path):
    return save_images(tmp_path / "photos", pixels(11))
