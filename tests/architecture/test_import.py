"""What importing fastvgg brings in, and which file may import which."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from pathlib import Path

import pytest

import fastvgg
from tests.helpers.batches import run_script

PACKAGE = Path(fastvgg.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
HEAVY = {
    "PIL",
    "botocore",
    "click",
    "fsspec",
    "h5py",
    "imageio",
    "keras",
    "matplotlib",
    "ml_dtypes",
    "numba",
    "numpy",
    "rich",
    "s3fs",
    "skimage",
    "torch",
    "typer",
    "upath",
    "zarr",
}


def test_importing_fastvgg_imports_nothing_heavy():
    script = "import json, sys, fastvgg; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run_script(script)))
    assert "fastvgg" in loaded
    assert not loaded & HEAVY
    assert not [name for name in loaded if name.startswith("fastvgg.")]


def test_catching_an_error_by_its_name_needs_no_numpy():
    script = "import json, sys, fastvgg.errors; print(json.dumps(sorted(sys.modules)))"
    assert not set(json.loads(run_script(script))) & HEAVY


def test_reading_the_version_and_the_names_imports_nothing_heavy():
    script = (
        "import json, sys, fastvgg; fastvgg.__version__; dir(fastvgg); "
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert not set(json.loads(run_script(script))) & HEAVY


@pytest.mark.parametrize("name", fastvgg.__all__)
def test_every_public_name_resolves_and_is_the_same_thing_again(name):
    value = getattr(fastvgg, name)
    assert value is not None
    assert getattr(fastvgg, name) is value


def test_dir_lists_the_public_names():
    assert dir(fastvgg) == sorted(fastvgg.__all__)
    expected = {"Mode", "Transform", "batches", "plan", "preprocess", "restore", "verify"}
    assert expected <= set(dir(fastvgg))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'fastvgg' has no attribute 'presto'"):
        _ = fastvgg.presto


def test_a_star_import_brings_the_public_names_and_no_other():
    script = "from fastvgg import *; print(*sorted(n for n in dir() if not n.startswith('_')))"
    public = sorted(name for name in fastvgg.__all__ if not name.startswith("_"))
    assert run_script(script).split() == public


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def module_of(name):
    """The module that a dotted name stands for or lies in: fastvgg.engine.apply is in engine."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] == "fastvgg":
        path = PACKAGE.joinpath(*parts[1:])
        if path.is_dir() or path.with_suffix(".py").exists():
            break
        parts.pop()
    return ".".join(parts)


def imports_in(source, file, functions=True, types=False):
    """The modules that a module imports: in functions, and for type checkers, only if asked."""
    package = ["fastvgg", *Path(file).parent.parts]
    found = set()
    nodes = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module_of(f"{origin}.{alias.name}") for alias in node.names}
        elif is_type_checking(node):
            nodes += node.orelse + node.body * types
        elif functions or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found


def imports_of(file, functions=True, types=False):
    return imports_in((PACKAGE / file).read_text(), file, functions, types)


def is_in(module, parent):
    return module == parent or module.startswith(parent + ".")


def within(modules, *parents):
    return {module for module in modules if any(is_in(module, parent) for parent in parents)}


def files_in(*patterns):
    """The files of those named: files, or folders with all that is in them; each has to exist."""
    found = {p: [f for f in FILES if f == p or f.startswith(p + "/")] for p in patterns}
    assert all(found.values()), found
    return [file for files in found.values() for file in files]


def test_the_reader_of_imports_sees_every_form_and_leaves_out_what_only_types_need():
    source = (
        "import os.path\n"
        "from typing import TYPE_CHECKING\n"
        "from fastvgg import engine, oracle as truth\n"
        "from fastvgg.transform import Mode\n"
        "from . import engine\n"
        "from .kernels import convert\n"
        "from ..errors import FastvggError\n"
        "if TYPE_CHECKING:\n"
        "    import rich\n"
        "else:\n"
        "    import json\n"
        "def late():\n"
        "    import numba as nb\n"
    )
    assert imports_in(source, "stream/here.py") == {
        "os.path",
        "typing.TYPE_CHECKING",
        "fastvgg.engine",
        "fastvgg.oracle",
        "fastvgg.transform",
        "fastvgg.stream",
        "fastvgg.errors",
        "json",
        "numba",
    }
    assert "numba" not in imports_in(source, "stream/here.py", functions=False)
    assert "rich" in imports_in(source, "stream/here.py", types=True)
    assert within({"fastvgg.kernels.convert", "fastvgg.kernel"}, "fastvgg.kernels") == {
        "fastvgg.kernels.convert"
    }


# From the bottom to the top. A folder is in a layer with all of its modules.
LAYERS = (
    ("errors", "formatting"),
    ("models",),
    ("transform",),
    ("oracle",),
    ("interop", "parallel", "tiling"),
    ("backend",),
    ("kernels",),
    ("call_plan",),
    ("engine",),
    ("imaging",),
    ("storage",),
    ("datasets",),
    ("stream",),
    ("executors",),
    ("loader", "torch", "dask", "keras"),
    ("bench", "demo"),
    ("cli",),
    ("__main__",),
)
# A value that is called or run hands itself to what executes it, and only then needs that.
FACADES = {
    ("transform", "fastvgg.engine"),
    ("stream", "fastvgg.executors.dask"),
    ("stream", "fastvgg.executors.threads"),
}


def part_of(file):
    return Path(file).parts[0].removesuffix(".py")


def test_every_module_is_in_a_layer():
    layered = {part for layer in LAYERS for part in layer}
    assert {part_of(file) for file in FILES} == layered | {"__init__"}


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_a_module_imports_only_its_own_layer_and_those_below_also_for_types(file):
    part = part_of(file)
    height = next(number for number, layer in enumerate(LAYERS) if part in layer)
    allowed = {f"fastvgg.{name}" for layer in LAYERS[: height + 1] for name in layer}
    facades = {module for name, module in FACADES if name == part}
    found = within(imports_of(file, types=True), "fastvgg") - {"fastvgg"}
    assert found == within(found, *allowed, *facades)
    assert not within(imports_of(file, functions=False, types=True), *facades)


def test_no_modules_import_each_other_also_for_types():
    graph = {}
    for file in FILES:
        name = ".".join(["fastvgg", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
        imported = within(imports_of(file, functions=False, types=True), "fastvgg")
        graph[name] = imported - {"fastvgg", name}
    leaves = {"fastvgg"}
    while leaves:
        graph = {name: found - leaves for name, found in graph.items() if name not in leaves}
        leaves = {name for name, found in graph.items() if not found}
    assert graph == {}


@pytest.mark.parametrize("file", files_in("kernels"))
def test_kernels_import_nothing_of_fastvgg_but_kernels_and_what_they_mean(file):
    modules = within(imports_of(file), "fastvgg")
    assert modules == within(modules, "fastvgg.kernels", "fastvgg.oracle", "fastvgg.transform")


@pytest.mark.parametrize("file", files_in("kernels"))
def test_kernels_use_what_numba_and_llvmlite_make_public(file):
    modules = within(imports_of(file), "numba", "llvmlite")
    extending = ("intrinsic", "lower_builtin", "models", "register_model", "type_callable")
    public = {"numba", "numba.types", "llvmlite.ir", "llvmlite.binding"}
    assert modules <= public | {f"numba.extending.{name}" for name in extending}
    assert "numba.core" not in (PACKAGE / file).read_text()


@pytest.mark.parametrize("file", [file for file in FILES if file != "torch.py"])
def test_only_what_is_for_pytorch_imports_it(file):
    assert not within(imports_of(file), "torch", "fastvgg.torch")


@pytest.mark.parametrize("package", ["h5py", "zarr"])
def test_only_what_is_for_a_format_imports_its_package(package):
    of_package = {"h5py": ["hdf5"], "zarr": ["zarr", "zarr_writer"]}[package]
    importing = [file for file in FILES if within(imports_of(file, functions=False), package)]
    assert importing == [f"datasets/{name}.py" for name in of_package]
    modules = [f"fastvgg.datasets.{name}" for name in of_package]
    others = [file for file in FILES if file not in importing]
    assert not [file for file in others if within(imports_of(file, functions=False), *modules)]


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("kernels/")])
def test_only_kernels_import_numba(file):
    assert not within(imports_of(file), "numba", "llvmlite")


def test_the_kernels_do_import_numba():
    assert any(within(imports_of(file), "numba") for file in files_in("kernels"))


@pytest.mark.parametrize(
    "file", files_in("stream/redo_log.py", "stream/redo_log_layout.py", "stream/commit_pipeline.py")
)
def test_what_makes_changes_last_knows_nothing_of_pixels(file):
    pixels = ("numpy", "PIL", "fastvgg.engine", "fastvgg.oracle", "fastvgg.kernels")
    assert not within(imports_of(file), *pixels, "fastvgg.datasets.npy", "fastvgg.datasets.images")


@pytest.mark.parametrize("file", files_in("stream/plan.py"))
def test_planning_is_arithmetic_and_touches_no_file(file):
    assert not within(imports_of(file), "os", "pathlib", "io", "shutil", "fastvgg.datasets")


@pytest.mark.parametrize("file", files_in("engine.py"))
def test_the_engine_knows_nothing_of_disks_and_terminals(file):
    above = ("fastvgg.stream", "fastvgg.datasets", "fastvgg.cli", "fastvgg.bench", "fastvgg.dask")
    assert not within(imports_of(file), *above)


@pytest.mark.parametrize("file", [r for r in FILES if r not in files_in("cli", "__main__.py")])
def test_only_the_command_line_imports_typer_and_rich(file):
    assert not within(imports_of(file), "typer", "click", "rich", "fastvgg.cli")


def public_methods(module):
    """Each public method of the classes that a module of datasets defines."""
    names = importlib.import_module(f"fastvgg.{module}")
    for class_ in vars(names).values():
        if inspect.isclass(class_) and class_.__module__ == names.__name__:
            for name, method in vars(class_).items():
                if not name.startswith("_") and inspect.isfunction(method):
                    yield class_, name


@pytest.mark.parametrize("file", files_in("datasets"))
def test_a_public_method_of_a_dataset_is_documented_there_or_in_its_interface(file):
    methods = public_methods(file.removesuffix(".py").replace("/", "."))
    assert not [method for method in methods if not inspect.getdoc(getattr(*method))]


def test_no_module_is_called_after_nothing():
    names = {part for file in FILES for part in Path(file).with_suffix("").parts}
    assert not names & {"common", "helper", "helpers", "misc", "util", "utils"}
