"""HTML representations: the same content as str, escaped, in well-formed tables."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

import fastvgg
from fastvgg import Mode, Transform
from fastvgg.formatting import html_table
from fastvgg.stream.report import MAX_FAILURES_SHOWN
from tests.helpers.datasets_on_disk import pixels, plan_of, save_images, save_npy


def read(html):
    """Return the caption of a table, and its rows, as a browser would show them."""
    root = ET.fromstring(html)  # noqa: S314  # our own output; raises if it is not well-formed
    assert root.tag == "table"
    assert {element.tag for element in root.iter()} <= {"table", "caption", "tr", "th", "td"}
    rows = [(row.findtext("th"), row.findtext("td")) for row in root.iter("tr")]
    return root.findtext("caption"), rows


def test_html_table_escapes_special_characters():
    odd = "<script>alert(1)</script> & \"quoted\" 'too'"
    html = html_table(odd, [(odd, odd), ("empty", "")])
    assert "<script>" not in html
    assert read(html) == (odd, [(odd, odd), ("empty", "")])


@pytest.fixture
def photos(tmp_path):
    return save_images(tmp_path / "<script>&photos", pixels(11))


def test_plan_repr_html_matches_its_text(tmp_path, photos):
    (photos / "labels.csv").touch()
    plan = fastvgg.plan(photos, tmp_path / "<b>.npy", mode="caffe")
    html = plan._repr_html_()
    assert "<script>" not in html
    assert "<b>" not in html
    caption, rows = read(html)
    first, *lines = str(plan).splitlines()
    assert caption == first
    assert caption.endswith(f"{photos} -> {tmp_path / '<b>.npy'}")
    assert [f"  {name:<9}{value}" for name, value in rows] == lines
    assert dict(rows)["note"] == "skipped files without an image suffix: 1 (1 .csv)"


def test_plan_repr_html_shows_in_place_and_thousands_separators(tmp_path):
    plan = plan_of(save_npy(tmp_path / "x.npy", pixels(1234, 1, 1)), tmp_path / "y.npy", mode="tf")
    assert dict(read(plan._repr_html_())[1])["images"] == "1,234"
    floats = save_npy(tmp_path / "floats.npy", pixels(3).astype("float32"))
    in_place = fastvgg.plan(floats, in_place=True, mode="tf")
    assert dict(read(in_place._repr_html_())[1])["writes"] == "2.2 KiB twice, in place"


@pytest.mark.parametrize("bad", [0, 1, MAX_FAILURES_SHOWN, MAX_FAILURES_SHOWN + 3])
def test_report_repr_html_matches_its_text_and_limits_failures(tmp_path, photos, bad):
    for number in range(bad):
        (photos / f"z<i>{number:02d}.jpg").touch()
    report = plan_of(photos, tmp_path / "y.npy", mode="caffe").run()
    html = report._repr_html_()
    assert "<script>" not in html
    assert "<i>" not in html
    caption, rows = read(html)
    assert caption == report.target
    facts = [(name, value) for name, value in rows if name in ("done", "before", "failed")]
    assert f"{caption}: {', '.join(value for _, value in facts)}" == str(report)
    listed = [(name, value) for name, value in rows if name.startswith("row ")]
    assert listed == [
        (f"row {failure.row}", f"{failure.path}: {failure.reason}")
        for failure in report.failures[:MAX_FAILURES_SHOWN]
    ]
    assert len(listed) == min(bad, MAX_FAILURES_SHOWN)
    more = dict(rows).get("and")
    expected = f"3 more, all listed in {report.target}.index.csv"
    assert more == (expected if bad > MAX_FAILURES_SHOWN else None)


def test_report_of_a_resumed_run_shows_the_chunks_already_done(tmp_path):
    plan = plan_of(save_npy(tmp_path / "x.npy", pixels(11)), tmp_path / "y.npy", mode="caffe")
    plan.run()
    resumed = fastvgg.plan(tmp_path / "x.npy", tmp_path / "y.npy", mode="caffe").run()
    assert dict(read(resumed._repr_html_())[1])["resumed"] == "1 of 1 chunk already done"


def test_transform_repr_html_shows_mode_layouts_dtype_and_formula():
    transform = Transform("torch", out_layout="NCHW", dtype="float16")
    caption, rows = read(transform._repr_html_())
    assert caption == "preprocess"
    assert rows == [
        ("mode", "torch"),
        ("formula", "y = (x / 255.0 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)"),
        ("channels of y", "RGB"),
        ("layout", "NHWC -> NCHW"),
        ("type", "float16"),
    ]


def test_restore_repr_html_shows_rounding():
    caption, rows = read(Transform("caffe", "restore", rounding="truncate")._repr_html_())
    assert caption == "restore"
    assert rows == [
        ("mode", "caffe"),
        ("formula", "x = y + (103.939, 116.779, 123.68)"),
        ("channels of y", "BGR"),
        ("layout", "NHWC -> NHWC"),
        ("type", "uint8"),
        ("rounding", "truncate"),
    ]


def test_pack_repr_html_shows_identity_formula():
    facts = dict(read(Transform("identity", "pack")._repr_html_())[1])
    assert (facts["formula"], facts["type"]) == ("y = x", "uint8")


def test_custom_mode_name_is_escaped():
    transform = Transform(Mode("<b>mine</b>", divide=2.0, std=(1.0, 2.0, 4.0)))
    html = transform._repr_html_()
    assert not re.search(r"<b>", html)
    facts = dict(read(html)[1])
    assert (facts["mode"], facts["formula"]) == (
        "<b>mine</b>",
        "y = (x / 2.0) / (1.0, 2.0, 4.0)",
    )


@pytest.mark.parametrize("direction", ["preprocess", "restore"])
@pytest.mark.parametrize("mode", ["caffe", "tf", "torch", "identity"])
def test_displayed_formula_matches_oracle(mode, direction):
    import numpy as np

    from fastvgg import oracle

    transform = Transform(mode, direction, dtype="float64")
    values = np.linspace(0, 255, 30).reshape(2, 5, 3).astype(np.float64)
    formula = dict(read(transform._repr_html_())[1])["formula"]
    _, _, right = formula.partition(" = ")
    flipped = values[..., ::-1] if transform.mode.is_bgr and direction == "preprocess" else values
    expression = re.sub(r"(\([\d., ]+\))", r"array(\1)", right)
    names = {"x": flipped, "y": flipped, "array": np.array}
    actual = eval(expression, names)  # noqa: S307  # our own
    if direction == "restore":
        actual = actual[..., ::-1] if transform.mode.is_bgr else actual
        actual = np.clip(np.rint(actual), 0, 255)
    np.testing.assert_allclose(oracle.apply(transform, values), actual, rtol=1e-12)
