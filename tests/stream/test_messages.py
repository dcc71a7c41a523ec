"""What a plan says about a request that it refuses, in the words of the caller."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest

import fastvgg
from fastvgg.errors import (
    FastvggError,
    ModeError,
    ResumeError,
    SourceError,
    StoppedError,
    TargetError,
    UsageError,
    command_line_vocabulary,
)
from fastvgg.stream.manifest import manifest_path
from fastvgg.transform import Mode
from tests.helpers.datasets_on_disk import (
    check_error,
    names_in,
    network_inputs,
    npy_bytes,
    pixels,
    plan_of,
    save_images,
    save_npy,
)

# Whatever else is wrong with a call, it first says that the source does not exist.
WRONG = {
    "no mode": {},
    "a mode": {"mode": "CAFFE"},
    "a model": {"model": "vgg99"},
    "a size": {"mode": "tf", "size": 224},
    "a dtype": {"mode": "tf", "dtype": "fp16"},
    "a layout": {"mode": "tf", "layout": "channels_first"},
    "threads": {"mode": "tf", "threads": 0},
    "memory": {"mode": "tf", "memory": "much"},
    "a flag": {"mode": "tf", "fsync": "no"},
    "a backend": {"mode": "tf", "backend": "cuda"},
    "a direction": {"mode": "tf", "direction": "back"},
    "in place and a target": {"mode": "tf", "in_place": True},
}


@pytest.mark.parametrize("name", ["photos", "x.npy", "x.zarr", "x.h5::/a", "x.tar"])
@pytest.mark.parametrize("wrong", WRONG)
def test_missing_source_is_reported_before_anything_else(tmp_path, wrong, name):
    with pytest.raises(SourceError, match="does not exist"):
        fastvgg.plan(tmp_path / name, tmp_path / "y.npy", **WRONG[wrong])
    if wrong == "no mode":
        with pytest.raises(SourceError, match="does not exist"):
            fastvgg.plan(tmp_path / name)
    assert names_in(tmp_path) == []


def test_missing_dataset_in_an_hdf5_file_is_reported_before_the_mode(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = pixels(3)
    with pytest.raises(SourceError, match="/nothing"):
        fastvgg.plan(f"{tmp_path / 'x.h5'}::/nothing", tmp_path / "y.npy")


# A model instead of a mode


@pytest.mark.parametrize("model", ["vgg19", "VGG-19"])
def test_plan_takes_a_model_for_its_mode(tmp_path, model):
    source = save_npy(tmp_path / "x.npy", pixels(3))
    plan_of(source, tmp_path / "y.npy", model=model).run()
    expected = network_inputs(pixels(3), "caffe")
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(expected)
    plan_of(tmp_path / "y.npy", tmp_path / "z.npy", direction="restore", model=model).run()
    assert (tmp_path / "z.npy").read_bytes() == npy_bytes(pixels(3))


@pytest.mark.parametrize("mode", ["caffe", Mode.CAFFE])
def test_plan_takes_a_model_with_the_mode_that_it_has(tmp_path, mode):
    source = save_npy(tmp_path / "x.npy", pixels(3))
    plan = fastvgg.plan(source, tmp_path / "y.npy", model="vgg19", mode=mode)
    assert plan.transform.mode is Mode.CAFFE


@pytest.mark.parametrize("mode", ["tf", "vgg19", Mode.TF, Mode("caffe", divide=2.0)], ids=repr)
def test_plan_refuses_a_model_with_another_mode(tmp_path, mode):
    source = save_npy(tmp_path / "x.npy", pixels(3))
    with pytest.raises(UsageError) as caught:
        fastvgg.plan(source, tmp_path / "y.npy", model="vgg16", mode=mode)
    check_error(caught.value, "mode=", "model='vgg16'", "caffe", "give only one")


def test_plan_names_the_option_for_a_model_that_is_given_as_a_mode(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(3))
    with pytest.raises(ModeError) as caught:
        fastvgg.plan(source, tmp_path / "y.npy", mode="vgg19")
    check_error(caught.value, "'vgg19' is a model", "mode='caffe'")


# What differs


@pytest.mark.parametrize(
    ("first", "now", "expected", "on_command_line"),
    [
        ({"mode": "tf"}, {"mode": "torch"}, "mode='tf' then, mode='torch' now", "--mode tf then"),
        (
            {"mode": "tf", "size": (5, 7)},
            {"mode": "tf", "size": (7, 5)},
            "size=(5, 7) then, size=(7, 5) now",
            "--size 5 7 then, --size 7 5 now",
        ),
        (
            {"mode": "tf", "exif": True},
            {"mode": "tf"},
            "exif=True then, exif=False now",
            "--exif then, no --exif now",
        ),
        (
            {"mode": "tf", "follow_links": False},
            {"mode": "tf"},
            "follow_links=False then, follow_links=True now",
            "--no-follow-links then, no --no-follow-links now",
        ),
        (
            {"mode": "tf", "dtype": "float16"},
            {"mode": "tf", "out_layout": "NCHW"},
            "dtype='float16' then, dtype='float32' now; out_layout='NHWC' then, out_layout='NCHW'",
            "--out-layout NHWC then, --out-layout NCHW now",
        ),
        (
            {"mode": Mode("own", divide=2.0)},
            {"mode": Mode("own", divide=3.0)},
            "divide of the mode 2.0 then, 3.0 now",
            "divide of the mode 2.0 then, 3.0 now",
        ),
        (
            {"mode": "tf"},
            {"direction": "pack"},
            "direction 'preprocess' then, 'pack' now",
            "direction 'preprocess' then, 'pack' now",
        ),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_target_of_other_settings_is_refused_with_both_values(
    tmp_path, first, now, expected, on_command_line, is_finished
):
    photos = save_images(tmp_path / "photos", pixels(4))
    target = tmp_path / "y.npy"
    plan_of(photos, target, **first).run()
    if not is_finished:
        make_unfinished(photos, target, **first)
    with pytest.raises(FastvggError) as caught:
        fastvgg.plan(photos, target, **now)
    check_error(caught.value, expected, "restart=True")
    assert isinstance(caught.value, ResumeError) != is_finished
    with command_line_vocabulary(), pytest.raises(FastvggError) as caught:
        fastvgg.plan(photos, target, **now)
    check_error(caught.value, on_command_line, "--restart")


def make_unfinished(source, target, **settings):
    """Replace a finished target by the unfinished run that wrote its first chunk."""
    from tests.helpers.faults import InterruptedStorage, SimulatedCrash
    from tests.helpers.runs import run

    target.unlink()
    manifest_path(target).unlink()
    target.with_name(f"{target.name}.index.csv").unlink()
    plan = plan_of(source, target, images_per_chunk=1, **settings)
    with pytest.raises(SimulatedCrash):
        run(plan, storage=InterruptedStorage(1))


# Before the first byte


@pytest.mark.parametrize("call", [fastvgg.plan, fastvgg.batches, fastvgg.verify, fastvgg.info])
def test_every_call_first_reports_that_its_dataset_does_not_exist(tmp_path, call):
    wrong = {fastvgg.plan: {"size": "no"}, fastvgg.batches: {"batch_size": 0, "shuffle": "no"}}
    with pytest.raises(SourceError, match="does not exist"):
        call(tmp_path / "missing.npy", **wrong.get(call, {}))


@pytest.mark.parametrize(
    ("size", "meant"),
    [
        (224, (224, 224)),
        ("224x112", (224, 112)),
        ("224", (224, 224)),
        ((224, 112, 3), (224, 112)),
        ("big", (224, 224)),
    ],
)
def test_size_written_otherwise_is_refused_with_the_spelling_to_use(tmp_path, size, meant):
    photos = save_images(tmp_path / "photos", pixels(2))
    with pytest.raises(UsageError) as caught:
        fastvgg.plan(photos, tmp_path / "y.npy", direction="pack", size=size)
    check_error(caught.value, repr(size), f"size={meant}")


def test_state_of_other_batches_is_refused_with_all_that_differs(tmp_path):
    path = save_npy(tmp_path / "x.npy", pixels(6))
    state = fastvgg.batches(path, 2, seed=1).state_dict()
    with pytest.raises(UsageError) as caught:
        fastvgg.batches(path, 3, seed=2, shuffle=True).load_state_dict(state)
    check_error(caught.value, "batch_size 2", "seed 1", "shuffle False")
    assert "batch_size 3, shuffle True, seed 2" in caught.value.problem


def test_batches_of_a_changed_dataset_name_what_changed(tmp_path):
    path = save_npy(tmp_path / "x.npy", pixels(6))
    batches = fastvgg.batches(path, 2)
    save_npy(path, pixels(7))
    with pytest.raises(SourceError, match=r"shape \(6, 7, 9, 3\) then, \(7, 7, 9, 3\) now"):
        next(iter(batches))


def test_read_error_while_planning_is_a_refusal_and_nothing_to_resume(tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise StoppedError("x.npy: read at offset 0 failed", "rerun: it resumes")

    source = save_npy(tmp_path / "x.npy", pixels(3))
    monkeypatch.setattr("fastvgg.stream.planner.open_source", fail)
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(source, tmp_path / "y.npy", mode="tf")
    check_error(caught.value, "read at offset 0 failed", "nothing was written")
    assert caught.value.exit_code == 3


# Memory


@pytest.mark.parametrize("size", [None, (5, 7)])
@pytest.mark.parametrize("memory", [0, 1, 64, "1MiB"])
def test_too_little_memory_to_decode_is_named_with_an_amount_that_suffices(tmp_path, memory, size):
    photos, target = save_images(tmp_path / "photos", pixels(4)), tmp_path / "y.npy"
    settings = {"mode": "tf", "size": size}
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(photos, target, memory=memory, **settings)
    check_error(caught.value, "more than 6.0 MiB of memory", "the limit is", "memory='64MiB'")
    fastvgg.plan(photos, target, memory="64MiB", **settings)


def test_too_little_memory_to_read_any_file_is_named(tmp_path):
    large = pixels(1, height=1300, width=1300)  # of 5 MB
    photos = save_images(tmp_path / "photos", large, ["a.bmp"])
    settings = {"mode": "tf", "threads": 1}
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(photos, tmp_path / "y.npy", memory="8MiB", **settings)
    check_error(caught.value, "give more memory: memory='512MiB'")
    fastvgg.plan(photos, tmp_path / "y.npy", memory="512MiB", **settings)


@pytest.mark.parametrize("direction", ["pack", "restore"])
def test_threads_that_do_not_fit_into_memory_are_named_with_a_number_that_fits(tmp_path, direction):
    if direction == "pack":
        source, target = save_images(tmp_path / "photos", pixels(4)), tmp_path / "y.npy"
    else:
        inputs = network_inputs(pixels(2, height=200, width=300), "tf")
        source, target = save_npy(tmp_path / "x.npy", inputs), tmp_path / "out"
    settings = {"direction": direction, **({"mode": "tf"} if direction == "restore" else {})}
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(source, target, threads=100_000, **settings)
    check_error(caught.value, "100000 threads need", "the limit is 512.0 MiB", "or memory='")
    threads = int(re.search(r"threads=(\d+) or fewer", caught.value.remedy)[1])
    fastvgg.plan(source, target, threads=threads, **settings)
    with pytest.raises(TargetError):
        fastvgg.plan(source, target, threads=threads + 1, **settings)


def test_memory_that_is_suggested_for_large_images_suffices(tmp_path):
    photos = save_images(tmp_path / "photos", pixels(1))
    settings = {"mode": "tf", "size": (1000, 1000), "threads": 1}
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(photos, tmp_path / "y.npy", memory="20MiB", **settings)
    memory = re.search("memory='(.+)'", caught.value.remedy)[1]
    fastvgg.plan(photos, tmp_path / "y.npy", memory=memory, **settings)


# Names and directories


@pytest.mark.parametrize("name", ["out dir", "it's", "-p", "$HOME"])
def test_command_that_creates_the_directory_of_a_target_works_in_a_shell(tmp_path, name):
    source = save_npy(tmp_path / "x.npy", pixels(3))
    target = tmp_path / name / "below" / "y.npy"
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(source, target, mode="tf")
    command = caught.value.remedy.removeprefix("create it: ")
    subprocess.run(["/bin/sh", "-c", command], check=True, cwd=tmp_path)
    fastvgg.plan(source, target, mode="tf")


@pytest.mark.parametrize("below", ["", "deep"])
def test_target_below_a_file_is_refused_without_creating_its_directory(tmp_path, below):
    source = save_npy(tmp_path / "x.npy", pixels(3))
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(source, source / below / "y.npy", mode="tf")
    check_error(caught.value, f"{source} is a file: choose")
    assert "mkdir" not in str(caught.value)


# Values of options


@pytest.mark.parametrize("dtype", ["int8", "fp8", "uint8x"])
@pytest.mark.parametrize("direction", ["preprocess", "restore"])
def test_dtype_is_suggested_only_if_the_direction_stores_it(tmp_path, dtype, direction):
    source = save_npy(tmp_path / "x.npy", network_inputs(pixels(3), "tf"))
    with pytest.raises(UsageError) as caught:
        fastvgg.plan(source, tmp_path / "y.npy", mode="tf", direction=direction, dtype=dtype)
    check_error(caught.value, f"unknown dtype '{dtype}'", "'float16'")
    assert ("uint8" in caught.value.remedy) == (direction == "restore")


# A source that changed


def damage(image):
    good = image.read_bytes()
    image.write_bytes(b"torn")
    return good


def test_rerun_after_failed_images_were_fixed_names_the_option_that_retries_them(tmp_path):
    photos, target = save_images(tmp_path / "photos", pixels(4)), tmp_path / "y.npy"
    image = sorted(photos.rglob("*.png"))[1]
    good = damage(image)
    fastvgg.plan(photos, target, mode="tf").run()
    image.write_bytes(good)
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(photos, target, mode="tf")
    check_error(caught.value, "made before its source changed", "give retry_failed=True")
    assert "fingerprint" not in str(caught.value)
    fastvgg.plan(photos, target, mode="tf", retry_failed=True).run()
    fastvgg.plan(photos, tmp_path / "fresh.npy", mode="tf").run()
    assert target.read_bytes() == (tmp_path / "fresh.npy").read_bytes()


def test_rerun_with_a_changed_source_offers_no_retry_where_nothing_failed(tmp_path):
    photos, target = save_images(tmp_path / "photos", pixels(4)), tmp_path / "y.npy"
    fastvgg.plan(photos, target, mode="tf").run()
    damage(sorted(photos.rglob("*.png"))[1])
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(photos, target, mode="tf")
    check_error(caught.value, "made before its source changed", "restart=True")
    assert "retry_failed" not in str(caught.value)
    assert caught.value.details["settings"].keys() == {"fingerprint of the source's content"}


def test_retry_with_other_settings_says_that_the_target_is_finished(tmp_path):
    photos, target = save_images(tmp_path / "photos", pixels(4)), tmp_path / "y.npy"
    damage(sorted(photos.rglob("*.png"))[1])
    fastvgg.plan(photos, target, mode="tf").run()
    with pytest.raises(ResumeError) as caught:
        fastvgg.plan(photos, target, mode="torch", retry_failed=True)
    check_error(caught.value, "was made with other settings", "give the same settings to retry")
    check_error(caught.value, "restart=True instead of retry_failed=True")  # these conflict


# Damage


@pytest.mark.parametrize("now", ["restored", "recreated"])
def test_what_a_damaged_manifest_leaves_to_do_works(tmp_path, now):
    source, target = save_npy(tmp_path / "x.npy", pixels(3)), tmp_path / "y.npy"
    fastvgg.plan(source, target, mode="tf").run()
    manifest_path(target).write_text("{")
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(target, tmp_path / "z.npy", direction="restore", mode="tf")
    check_error(caught.value, manifest_path(target), "move the manifest away", "its mode")
    check_error(caught.value, "to recreate the dataset, move both away")
    with pytest.raises(TargetError, match="move it away"):
        fastvgg.plan(source, target, mode="tf", restart=True)
    manifest_path(target).rename(tmp_path / "damaged.json")
    if now == "restored":
        settings = {"mode": "tf", "layout": "NHWC", "direction": "restore"}
        fastvgg.plan(target, tmp_path / "z.npy", **settings).run()
        assert (tmp_path / "z.npy").read_bytes() == npy_bytes(pixels(3))
    else:
        target.rename(tmp_path / "old.npy")
        fastvgg.plan(source, target, mode="tf").run()
        assert target.read_bytes() == npy_bytes(network_inputs(pixels(3), "tf"))


def test_dataset_of_another_shape_than_was_written_is_to_be_moved_away(tmp_path):
    source, target = save_npy(tmp_path / "x.npy", pixels(3)), tmp_path / "y.npy"
    fastvgg.plan(source, target, mode="tf").run()
    save_npy(target, network_inputs(pixels(3, height=11), "tf"))
    for call in (
        lambda: fastvgg.plan(source, target, mode="tf", restart=True),
        lambda: fastvgg.plan(target, tmp_path / "z.npy", direction="restore"),
    ):
        with pytest.raises((SourceError, TargetError)) as caught:
            call()
        check_error(caught.value, "away")
        assert "remove" not in str(caught.value)


# Arrays that are not batches


@pytest.mark.parametrize("kind", ["npy", "h5", "zarr"])
@pytest.mark.parametrize(
    ("x", "remedy", "fix"),
    [
        (pixels(6).reshape(2, 3, 7, 9, 3), "array.reshape(-1, 7, 9, 3)", None),
        (pixels(1)[0], "array[numpy.newaxis]", None),
        (pixels(6)[..., 0], "numpy.stack([array] * 3, axis=-1)", None),
        (pixels(6).reshape(6, 189), "array.reshape(6, HEIGHT, WIDTH, 3)", (7, 9)),
        (np.arange(8), "labels", None),
    ],
    ids=["video", "one image", "grayscale", "flat", "labels"],
)
def test_array_of_another_rank_gets_the_advice_that_fits_it(tmp_path, kind, x, remedy, fix):
    path = save_array(tmp_path, kind, x)
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(path, tmp_path / "y.npy", mode="tf")
    check_error(caught.value, remedy)
    described = fastvgg.info(path)
    expected = ["not a dataset", {"h5": "hdf5"}.get(kind, kind), list(x.shape)]
    assert [described[name] for name in ("state", "kind", "shape")] == expected
    assert np.dtype(described["dtype"]) == x.dtype
    if "array" in remedy:
        expression = re.search(r"(array|numpy)[.\[].*", caught.value.remedy)[0]
        for name, length in zip(("HEIGHT", "WIDTH"), fix or (), strict=False):
            expression = expression.replace(name, str(length))
        batch = eval(expression, {"numpy": np, "array": x})  # noqa: S307  # our own remedy
        fastvgg.plan(save_npy(tmp_path / "fixed.npy", batch), tmp_path / "y.npy", mode="tf")


def save_array(directory, kind, x):
    if kind == "npy":
        np.save(directory / "x.npy", x)
        return directory / "x.npy"
    if kind == "h5":
        with pytest.importorskip("h5py").File(directory / "x.h5", "w") as file:
            file["x"] = x
        return f"{directory / 'x.h5'}::/x"
    zarr = pytest.importorskip("zarr")
    zarr.create_array(directory / "x.zarr", data=x)
    return directory / "x.zarr"


@pytest.mark.parametrize("kind", ["npy", "h5", "zarr"])
def test_array_of_another_dtype_is_described_with_it(tmp_path, kind):
    described = fastvgg.info(save_array(tmp_path, kind, pixels(2).astype(np.int64)))
    assert described["state"] == "not a dataset"
    assert described["shape"] == [2, 7, 9, 3]
    assert np.dtype(described["dtype"]) == np.int64


def test_array_of_objects_names_the_function_that_joins_them(tmp_path):
    images = np.empty(2, object)
    images[:] = list(pixels(2))
    np.save(tmp_path / "x.npy", images, allow_pickle=True)
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(tmp_path / "x.npy", tmp_path / "y.npy", mode="tf")
    check_error(caught.value, "pickled", "numpy.stack(list(array))")
    assert fastvgg.info(tmp_path / "x.npy")["shape"] == [2]


# Directories without images


def test_folder_of_links_that_are_not_followed_names_the_option_to_omit(tmp_path):
    photos, links = save_images(tmp_path / "photos", pixels(3)), tmp_path / "links"
    links.mkdir()
    for row, path in enumerate(photos.rglob("*.png")):
        (links / f"{row}.png").symlink_to(path)
    settings = {"mode": "tf", "follow_links": False}
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(links, tmp_path / "y.npy", **settings)
    check_error(caught.value, "skipped links: 3", "omit follow_links=False")
    with command_line_vocabulary(), pytest.raises(SourceError) as caught:
        fastvgg.plan(links, tmp_path / "y.npy", **settings)
    check_error(caught.value, "omit --no-follow-links")
    assert fastvgg.plan(links, tmp_path / "y.npy", mode="tf").header.images == 3


@pytest.mark.parametrize("name", ["{}.npy", "fold{}/part-0.npy"])
def test_folder_of_arrays_says_how_parts_are_named(tmp_path, name):
    for row in range(2):
        path = tmp_path / "arrays" / name.format(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_npy(path, pixels(2))
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(tmp_path / "arrays", tmp_path / "y.npy", mode="tf")
    check_error(caught.value, "2 .npy", "name them part-*.npy, all in one directory")


# Datasets in files


@pytest.mark.parametrize(
    "written", ["x.h5::/Images", "x.h5::/image", "x.h5:images", "x.h5:/images"]
)
def test_dataset_that_was_probably_meant_is_named(tmp_path, written):
    with pytest.importorskip("h5py").File(tmp_path / "x.h5", "w") as file:
        file["images"] = pixels(2)
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(tmp_path / written, tmp_path / "y.npy", mode="tf")
    check_error(caught.value, f"did you mean {tmp_path / 'x.h5'}::/images?", written[4:].strip(":"))


def test_name_in_a_zip_is_refused_as_a_zip(tmp_path):
    (tmp_path / "d.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    for call in (fastvgg.verify, fastvgg.info):
        with pytest.raises(SourceError, match="is a zip archive"):
            call(f"{tmp_path / 'd.zip'}::data")


def test_verify_of_a_missing_dataset_in_a_finished_file_says_so(tmp_path):
    pytest.importorskip("h5py")
    source, target = save_npy(tmp_path / "x.npy", pixels(2)), tmp_path / "y.h5"
    fastvgg.plan(source, f"{target}::/images", mode="tf").run()
    with pytest.raises(SourceError) as caught:
        fastvgg.verify(f"{target}::/other")
    check_error(caught.value, "has no dataset '/other'. Datasets: '/images'", "give one of them")


# Arguments


def test_command_line_names_its_own_arguments_and_offers_in_place_only_for_a_file(tmp_path):
    photos, source = (
        save_images(tmp_path / "photos", pixels(2)),
        save_npy(tmp_path / "x.npy", pixels(2)),
    )
    with command_line_vocabulary():
        with pytest.raises(UsageError) as caught:
            fastvgg.plan(photos, mode="tf")
        check_error(caught.value, "no DST is given", "give a DST")
        assert "in-place" not in str(caught.value)
        with pytest.raises(UsageError) as caught:
            fastvgg.plan(source, mode="tf")
        check_error(caught.value, "no DST is given", "give either a DST or --in-place")
        with pytest.raises(UsageError) as caught:
            fastvgg.plan(photos, tmp_path / "y.npy", mode="tf", size=(0, 0))
        check_error(caught.value, "invalid --size 0 0")
        with pytest.raises(UsageError) as caught:
            fastvgg.plan(photos, tmp_path / "y.npy", mode="tf", threads=0)
        check_error(caught.value, "invalid --threads 0")


def test_array_given_as_a_path_is_named_by_its_type(tmp_path):
    with pytest.raises(UsageError) as caught:
        fastvgg.plan(pixels(2), tmp_path / "y.npy", mode="tf")
    check_error(caught.value, "got ndarray, which is not a path", "give a string or a path")


def test_client_that_is_none_of_dask_is_refused(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(2))
    with pytest.raises(UsageError) as caught:
        fastvgg.plan(source, tmp_path / "y.npy", mode="tf").run(client="local")
    check_error(caught.value, "client is 'local'", "give a distributed.Client")
    assert names_in(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("name", ["x.tar", "x.jpg", "x"])
def test_array_is_read_whatever_its_name(tmp_path, name):
    save_npy(tmp_path / "x.npy", pixels(2)).rename(tmp_path / name)
    fastvgg.plan(tmp_path / name, tmp_path / "y.npy", mode="tf").run()
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(network_inputs(pixels(2), "tf"))
