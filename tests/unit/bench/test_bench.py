"""Benchmark figures are complete, and a fast but wrong result is an error."""

import itertools
import json
import mmap
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from typer.testing import CliRunner

from fastvgg import bench
from fastvgg.bench import io, kernels, memory, report
from fastvgg.bench.memory import Arena
from fastvgg.cli import app
from fastvgg.errors import SourceError, TargetError, UsageError, VerificationError
from fastvgg.kernels import bandwidth
from fastvgg.kernels.jit import processor
from fastvgg.storage.location import Location
from tests.helpers.batches import FLOATS, KERAS_MODES, LAYOUT_PAIRS
from tests.helpers.datasets_on_disk import PHOTOGRAPHS, stdout_on_small_disk

TINY = bench.BenchConfig(8 * 2**20, 2, 4, 2**20 + 4097, has_all_paths=False)


@pytest.fixture(scope="module")
def record_and_figures(tmp_path_factory):
    """Return the record of a full run, and the figures that the callback received."""
    photos = tmp_path_factory.mktemp("photos")
    for name in ("rocket.jpg", "coffee.png", "camera.png"):
        (photos / name).write_bytes((PHOTOGRAPHS / name).read_bytes())
    (photos / "bad.jpg").write_bytes(b"\xff\xd8 no more than that")
    scratch = tmp_path_factory.mktemp("disk")
    received = []
    record = bench.measure(
        TINY,
        images=photos,
        disk=scratch,
        threads=2,
        on_figure=lambda part, row: received.append((part, row)),
    )
    assert not list(scratch.iterdir())
    return record, received


def test_record_has_every_path_and_serializes_to_json(record_and_figures):
    record, received = record_and_figures
    assert [row["path"] for row in record["kernels"]] == [
        path.name for path in kernels.COMMON_PATHS
    ]
    assert all(row["images_per_second"] > 0 < row["share"] for row in record["kernels"])
    assert all(row["numpy_images_per_second"] > 0 for row in record["kernels"])
    assert {row["loop"] for row in record["memory"]} >= {"copy", "in place", "fill"}
    assert (record["threads"], record["rounds"]) == (2, 2)
    assert json.loads(json.dumps(record))["call_overhead_us"] == record["call_overhead_us"]
    expected = [("disk", record["disk"]), ("decoding", record["decoding"])]
    expected += [("memory", row) for row in record["memory"]]
    expected += [("kernels", row) for row in record["kernels"]]
    assert received == expected


def test_unreadable_images_are_counted(record_and_figures):
    decoded = record_and_figures[0]["decoding"]
    assert (decoded["images"], decoded["failed"]) == (4, 1)
    assert decoded["images_per_second"] > 0


def test_lines_fit_80_columns(record_and_figures):
    lines = [
        *report.HEADINGS.values(),
        *(report.line(part, row) for part, row in record_and_figures[1]),
    ]
    assert max(len(line) for text in lines for line in text.splitlines()) <= 80
    figures = record_and_figures[0]["kernels"][0]
    assert f"{figures['images_per_second']:,}" in report.line("kernels", figures)


@pytest.mark.parametrize("name", ["uint8-float16 caffe NHWC", "float32-uint8 tf NHWC-NCHW"])
def test_one_wrong_bit_in_the_last_image_raises(name, monkeypatch):
    (path,) = (path for path in kernels.PATHS if path.name == name)
    right = kernels.engine.apply

    def wrong(transform, x, out=None, **options):
        result = right(transform, x, out, **options)
        result[-1].view(np.uint8)[-1, -1, -1] ^= 1
        return result

    monkeypatch.setattr(kernels.engine, "apply", wrong)
    with pytest.raises(
        VerificationError, match=r"image \d+ of \d+ differs from the NumPy reference"
    ):
        kernels.measure_path(path, Arena(TINY.working_set_bytes), 2, 2)


def test_paths_cover_every_mode_dtype_and_layout_pair_in_both_directions():
    names = [path.name for path in kernels.PATHS]
    assert len(set(names)) == len(names)
    for mode, float_, (layout, out_layout) in itertools.product(
        (*KERAS_MODES, "identity"), FLOATS, LAYOUT_PAIRS
    ):
        layouts = layout if layout == out_layout else f"{layout}-{out_layout}"
        assert f"uint8-{float_} {mode} {layouts}" in names
        assert f"{float_}-uint8 {mode} {layouts}" in names
    assert set(kernels.COMMON_PATHS) < set(kernels.PATHS)


def test_kernels_below_the_limit_are_marked_and_listed():
    row = {"path": "uint8-float32 tf NHWC", "images_per_second": 10, "gigabytes_per_second": 1.0}
    row |= {"numpy_images_per_second": 1}
    shares = {0.89: True, 0.9: False, 1.02: False}
    for share, is_low in shares.items():
        assert report.line("kernels", {**row, "share": share}).endswith(" <") == is_low
        record = {"kernels": [{**row, "share": share}]}
        assert report.low_paths(record) == [row["path"]] * is_low
    new = {**row, "path": "uint8-float32 tf NHWC, new memory", "share": 0.5}
    assert report.low_paths({"kernels": [new]}) == []


@pytest.mark.parametrize("path", kernels.COMMON_PATHS, ids=lambda path: path.name)
def test_expected_result_of_a_path_is_derived_from_the_image_only(path):
    one, expected = kernels.example(path.transform, path.dtype)
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    assert one.dtype.name == path.dtype
    if path.transform.direction == "restore":
        channels = 0 if path.transform.out_layout == "NCHW" else -1
        assert np.array_equal(np.moveaxis(expected, channels, -1), image)
    else:
        channels = 0 if path.transform.layout == "NCHW" else -1
        assert np.array_equal(np.moveaxis(one, channels, -1).astype(np.uint8), image)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_copy_writes_exactly_the_output_bytes(prefetch, threads):
    rng = np.random.default_rng(0)
    buffer = rng.integers(0, 256, 3 * bandwidth.STEP_BYTES * 41 + 128, dtype=np.uint8)
    before = buffer.copy()
    x = rng.integers(0, 256, 3 * bandwidth.STEP_BYTES * 41, dtype=np.uint8)
    start = -buffer.ctypes.data % 64 + 64
    out = buffer[start : start + x.size]
    memory.copy(x, out, threads, prefetch=prefetch)
    assert np.array_equal(out, x)
    assert np.array_equal(buffer[:start], before[:start])
    assert np.array_equal(buffer[start + x.size :], before[start + x.size :])


def test_copy_reads_every_input_byte():
    parts = np.random.default_rng(0).integers(0, 256, (7 * 3, 4, 64), np.uint8)  # of cache lines
    x = parts.reshape(-1).view(np.float32)
    buffer = np.zeros(parts[:, 0].size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    out = buffer[start : start + parts[:, 0].size]
    memory.copy(x, out, 2, prefetch=False)
    assert np.array_equal(out, np.bitwise_xor.reduce(parts, axis=1).reshape(-1))


def test_fill_writes_exactly_the_output_bytes():
    buffer = np.zeros(bandwidth.STEP_BYTES * 7 + 128, np.uint8)
    start = -buffer.ctypes.data % 64 + 64
    memory.fill(buffer[start : start + bandwidth.STEP_BYTES * 7 - 64], 2)
    expected = np.zeros_like(buffer)
    expected[start : start + bandwidth.STEP_BYTES * 6] = 1
    assert np.array_equal(buffer, expected)


def test_scale_multiplies_every_element_in_place():
    y = np.full(bandwidth.STEP_BYTES * 5, 3, np.float32)
    memory.scale(y, 2, prefetch=True)
    assert np.array_equal(y, np.full_like(y, np.float32(3) * np.float32(1.0000001)))


def test_arena_returns_non_overlapping_batches():
    arena = Arena(10_000)
    one, result = np.arange(3, dtype=np.uint8), np.arange(3, dtype=np.float64)
    x, out = arena.pair(10_000 // 27, one, result)
    out[:] = np.inf
    assert np.array_equal(x, np.tile(one, (len(x), 1)))
    assert not np.shares_memory(x, out)
    assert out.ctypes.data % mmap.PAGESIZE == 0


def test_measuring_decoding_of_an_array_is_rejected(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 5, 7, 3), np.uint8))
    with pytest.raises(SourceError, match="is an array"):
        io.measure_decoding(Location.parse(tmp_path / "x.npy"), 4, 2, 1)


def test_missing_images_are_rejected_before_measuring(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        bench.measure(TINY, images=tmp_path / "no", on_figure=lambda *_: pytest.fail("measured"))


def test_pixels_that_differ_from_pillow_raise(tmp_path, monkeypatch):
    (tmp_path / "rocket.jpg").write_bytes((PHOTOGRAPHS / "rocket.jpg").read_bytes())
    monkeypatch.setattr(io, "DecodeOptions", lambda size: cropping_decode_options(size))
    with pytest.raises(VerificationError, match=r"rocket\.jpg"):
        io.measure_decoding(Location.parse(tmp_path), 4, 2, 1)


def cropping_decode_options(size):
    from fastvgg.imaging.decode import DecodeOptions

    return DecodeOptions(size=size, keep_aspect_ratio=True)


def test_missing_disk_directory_is_rejected(tmp_path):
    with pytest.raises(TargetError, match="cannot be measured"):
        io.measure_disk(tmp_path / "no", 4096, 2)


def test_insufficient_disk_space_is_rejected_before_writing(tmp_path):
    source = f"""
from pathlib import Path
from fastvgg.bench import io
from fastvgg.errors import TargetError
there = Path({str(tmp_path)!r})
try:
    io.measure_disk(there, 2**20, 2)
except TargetError as error:
    print(error.problem, list(there.iterdir()))
"""
    actual = stdout_on_small_disk(tmp_path, 2**20, source)
    assert actual.endswith("has 1048576 bytes of free space, needs 2097152 []")


def test_disk_benchmark_writes_and_reads_every_byte(tmp_path, monkeypatch):
    nbytes, sizes, read = 2**20 + 5, [], []

    def run_once(calls, rounds):
        write, drop_cache, read_all = calls
        write()
        sizes.extend(path.stat().st_size for path in tmp_path.glob("*/*"))
        drop_cache()
        read_all()
        return [[0.002] * rounds, [0.5] * rounds, [0.001] * rounds]

    def read_and_compare(path, buffer):
        read_file(path, buffer)
        read.append(bytes(buffer[:nbytes]) == path.read_bytes())

    read_file = io.read_file
    monkeypatch.setattr(io, "time_interleaved", run_once)
    monkeypatch.setattr(io, "read_file", read_and_compare)
    actual = io.measure_disk(tmp_path, nbytes, 2)
    assert (actual["bytes"], sizes, read) == (nbytes, [nbytes], [True])
    assert actual["write_gigabytes_per_second"] == 0.52
    assert actual["read_gigabytes_per_second"] == 1.05
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_plot_of_a_record_is_reproducible(record_and_figures, tmp_path, ending):
    for name in ("one", "other"):
        report.draw_roofline(record_and_figures[0], tmp_path / f"{name}.{ending}")
    assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"other.{ending}").read_bytes()


def test_plot_shows_the_throughput_of_every_nhwc_path(record_and_figures, tmp_path):
    report.draw_roofline(record_and_figures[0], tmp_path / "roofline.svg")
    root = ET.parse(tmp_path / "roofline.svg").getroot()  # noqa: S314  # our own
    texts = [text.strip() for text in root.itertext()]
    shown = [row for row in record_and_figures[0]["kernels"] if "NCHW" not in row["path"]]
    assert 0 < len(shown) < len(record_and_figures[0]["kernels"])
    paths = [row["path"] for row in record_and_figures[0]["kernels"] if row["path"] in texts]
    assert paths == [row["path"] for row in shown]
    speeds = [text for text in texts if text.endswith(" images/s")]
    assert speeds == [f"{row['images_per_second']:,} images/s" for row in shown]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x.txt", "suffix is not one of"),
        ("x.pdf", "suffix is not one of .png, .svg"),
        ("no/x.svg", "no is not a directory"),
    ],
)
def test_invalid_plot_path_is_rejected(path, message):
    with pytest.raises(UsageError, match=message):
        report.check_plot_path(Path(path))


def test_missing_matplotlib_is_reported_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"\.\[plot\]"):
        report.check_plot_path(Path("x.svg"))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "QUICK", TINY)


def test_bench_command_prints_every_figure_and_confirms_all_results(tiny, tmp_path):
    result = CliRunner().invoke(app, ["bench", "--quick", "--disk", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for part in ("disk", "memory", "kernels"):
        assert result.stdout.count(report.HEADINGS[part]) == 1
    assert all(f"\n{path.name} " in result.stdout for path in kernels.COMMON_PATHS)
    assert "every result matches the NumPy reference, bit for bit" in result.stdout
    assert f"compiled for {processor().name}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_bench_json_output_is_pure_json_and_the_plot_is_written(tiny, tmp_path):
    picture = tmp_path / "roofline.svg"
    result = CliRunner().invoke(app, ["bench", "--quick", "--json", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert [row["path"] for row in record["kernels"]] == [
        path.name for path in kernels.COMMON_PATHS
    ]
    assert f"{record['kernels'][0]['images_per_second']:,} images/s" in picture.read_text()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--plot", "x.txt"], 2),
        (["--images", "no"], 3),
        (["--disk", "no"], 3),
        (["--threads", "0"], 2),
    ],
)
def test_invalid_bench_options_exit_before_measuring(options, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == code
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) >= 2


def test_existing_file_is_not_replaced_by_a_plot(tmp_path):
    path = tmp_path / "roofline.svg"
    path.write_text("precious")
    with pytest.raises(UsageError) as caught:
        report.check_plot_path(path)
    assert str(path) in caught.value.problem
