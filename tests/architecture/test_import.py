"""Imports: what `import fastvgg` loads, and which modules may import which."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from importlib.util import find_spec
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
    assert {name for name in loaded if name.startswith("fastvgg.")} == {"fastvgg.fork_lock"}


def test_importing_errors_imports_nothing_heavy():
    script = "import json, sys, fastvgg.errors; print(json.dumps(sorted(sys.modules)))"
    assert not set(json.loads(run_script(script))) & HEAVY


def test_version_and_dir_import_nothing_heavy():
    script = (
        "import json, sys, fastvgg; fastvgg.__version__; dir(fastvgg); "
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert not set(json.loads(run_script(script))) & HEAVY


@pytest.mark.parametrize("name", fastvgg.__all__)
def test_public_names_resolve_to_the_same_object_every_time(name):
    value = getattr(fastvgg, name)
    assert value is not None
    assert getattr(fastvgg, name) is value


MODULES = ("dask", "keras", "torch")


def test_dir_lists_the_public_names_and_the_modules_that_can_be_imported():
    modules = [name for name in MODULES if name != "torch" or find_spec("torch")]
    assert dir(fastvgg) == sorted([*fastvgg.__all__, *modules])
    expected = {"Mode", "Transform", "batches", "plan", "preprocess", "restore", "verify"}
    assert expected <= set(dir(fastvgg))


@pytest.mark.parametrize("name", MODULES)
def test_modules_for_other_libraries_are_attributes(name):
    script = f"import fastvgg; print(fastvgg.{name}.__name__, fastvgg.{name}.__all__)"
    if name == "torch" and not find_spec("torch"):
        script = (
            "import fastvgg\n"
            "try:\n"
            "    fastvgg.torch\n"
            "except ModuleNotFoundError as error:\n"
            "    print('fastvgg.torch needs', error.name)\n"
        )
    assert run_script(script).startswith(f"fastvgg.{name} ")


def test_unknown_attribute_raises_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'fastvgg' has no attribute 'presto'"):
        _ = fastvgg.presto


def test_star_import_exports_exactly_the_public_names():
    script = "from fastvgg import *; print(*sorted(n for n in dir() if not n.startswith('_')))"
    public = sorted(name for name in fastvgg.__all__ if not name.startswith("_"))
    assert run_script(script).split() == public


def test_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").exists()


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def module_of(name):
    """Return the module of a dotted name: fastvgg.engine for fastvgg.engine.apply."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] == "fastvgg":
        path = PACKAGE.joinpath(*parts[1:])
        if path.is_dir() or path.with_suffix(".py").exists():
            break
        parts.pop()
    return ".".join(parts)


def imports_in(source, file, functions=True, types=False):
    """Return the modules that a module imports, optionally in functions and for type checkers."""
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
        elif functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found


def imports_of(file, functions=True, types=False):
    return imports_in((PACKAGE / file).read_text(), file, functions, types)


def is_in(module, parent):
    return module == parent or module.startswith(parent + ".")


def within(modules, *parents):
    return {module for module in modules if any(is_in(module, parent) for parent in parents)}


def files_in(*patterns):
    """Return the named files and the files in the named folders; every name must exist."""
    found = {p: [f for f in FILES if f == p or f.startswith(p + "/")] for p in patterns}
    assert all(found.values()), found
    return [file for files in found.values() for file in files]


def test_imports_in_finds_every_import_form_and_omits_type_checking_imports():
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


# From bottom to top. A folder is in a layer with all of its modules.
LAYERS = (
    ("fork_lock", "escaping", "errors", "formatting", "choices"),
    ("models",),
    ("transform",),
    ("oracle",),
    ("buffer_pool", "interop", "parallel", "tiling", "values"),
    ("kernels",),
    ("backend",),
    ("call_plan",),
    ("engine",),
    ("imaging",),
    ("storage",),
    ("datasets",),
    ("stream",),
    ("executors",),
    ("batch_builder", "loader", "torch", "dask", "keras"),
    ("bench", "demo"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
# Only functions import these: when a transform is called, or a plan is run.
FACADES = {
    "fastvgg.transform": {"fastvgg.engine"},
    "fastvgg.stream.plan": {
        "fastvgg.stream.run",
        "fastvgg.stream.in_place",
        "fastvgg.executors.threads",
        "fastvgg.executors.dask",
    },
}


def module_name(file):
    return ".".join(["fastvgg", *Path(file).with_suffix("").parts]).removesuffix(".__init__")


def layer_name(module):
    return [*module.split("."), "__init__"][1]


def height(module):
    return next(n for n, layer in enumerate(LAYERS) if layer_name(module) in layer)


def checked_imports(file):
    """Return the imports of fastvgg in a module, at any level and for types, except of facades."""
    name = module_name(file)
    late = imports_of(file, types=True) - FACADES.get(name, set())
    return within(late | imports_of(file, functions=False, types=True), "fastvgg") - {name}


def test_every_module_belongs_to_a_layer():
    layered = {part for layer in LAYERS for part in layer}
    assert {layer_name(module_name(file)) for file in FILES} == layered


@pytest.mark.parametrize("file", FILES)
def test_modules_import_only_from_their_own_and_lower_layers(file):
    own = height(module_name(file))
    assert not [module for module in checked_imports(file) if height(module) > own]


def test_there_are_no_import_cycles():
    graph = {module_name(file): checked_imports(file) for file in FILES}
    while leaves := {name for name, found in graph.items() if not found}:
        graph = {name: found - leaves for name, found in graph.items() if name not in leaves}
    assert graph == {}


def test_facades_import_what_they_call():
    found = {module_name(file): imports_of(file) for file in FILES}
    assert not {name: late - found[name] for name, late in FACADES.items() if late - found[name]}


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_modules_import_by_statements_that_these_tests_can_see(file):
    assert not re.search(r"\b(import_module|__import__)\b", (PACKAGE / file).read_text())


@pytest.mark.parametrize("file", files_in("kernels"))
def test_kernels_import_only_kernels_and_what_defines_pixels(file):
    below = {f"fastvgg.{name}" for name in ("kernels", "oracle", "tiling", "transform")}
    modules = within(imports_of(file, types=True), "fastvgg")
    assert modules == within(modules, *below)


@pytest.mark.parametrize("file", files_in("kernels"))
def test_kernels_use_only_public_numba_and_llvmlite_apis(file):
    modules = within(imports_of(file), "numba", "llvmlite")
    extending = ("intrinsic", "lower_builtin", "models", "register_model", "type_callable")
    public = {"numba", "numba.types", "llvmlite.ir", "llvmlite.binding"}
    assert modules <= public | {f"numba.extending.{name}" for name in extending}
    assert "numba.core" not in (PACKAGE / file).read_text()


@pytest.mark.parametrize("file", [file for file in FILES if file != "torch.py"])
def test_only_the_torch_module_imports_pytorch(file):
    assert not within(imports_of(file), "torch", "fastvgg.torch")


@pytest.mark.parametrize("package", ["h5py", "zarr"])
def test_only_format_modules_import_the_format_package(package):
    of_package = {
        "h5py": ["hdf5", "hdf5_chunks", "hdf5_file"],
        "zarr": ["zarr", "zarr_codecs", "zarr_store", "zarr_writer"],
    }[package]
    importing = [file for file in FILES if within(imports_of(file, functions=False), package)]
    assert importing == [f"datasets/{name}.py" for name in of_package]
    modules = [f"fastvgg.datasets.{name}" for name in of_package]
    others = [file for file in FILES if file not in importing]
    assert not [file for file in others if within(imports_of(file, functions=False), *modules)]


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("kernels/")])
def test_only_kernels_import_numba(file):
    assert not within(imports_of(file), "numba", "llvmlite")


def test_kernels_import_numba():
    assert any(within(imports_of(file), "numba") for file in files_in("kernels"))


@pytest.mark.parametrize(
    "file", files_in("stream/redo_log.py", "stream/redo_log_layout.py", "stream/commit_pipeline.py")
)
def test_durability_modules_do_not_depend_on_pixels(file):
    pixels = ("numpy", "PIL", "fastvgg.engine", "fastvgg.oracle", "fastvgg.kernels")
    assert not within(imports_of(file), *pixels, "fastvgg.datasets.npy", "fastvgg.datasets.images")


@pytest.mark.parametrize("file", files_in("stream/plan.py"))
def test_planning_does_no_io(file):
    assert not within(imports_of(file), "os", "pathlib", "io", "shutil", "fastvgg.datasets")


@pytest.mark.parametrize("file", files_in("engine.py"))
def test_engine_does_not_depend_on_storage_or_cli(file):
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
def test_public_dataset_methods_have_or_inherit_a_docstring(file):
    methods = public_methods(file.removesuffix(".py").replace("/", "."))
    assert not [method for method in methods if not inspect.getdoc(getattr(*method))]


def test_no_module_has_a_generic_name():
    names = {part for file in FILES for part in Path(file).with_suffix("").parts}
    assert not names & {"common", "helper", "helpers", "misc", "util", "utils"}
