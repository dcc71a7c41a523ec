"""Backend selection: NumPy until a kernel pays off; forks, late threads and exit handlers."""

from __future__ import annotations

import pytest

from fastvgg import backend
from fastvgg.errors import UsageError
from tests.helpers.batches import run_script
from tests.helpers.datasets_on_disk import pixels, python, save_npy

pytestmark = pytest.mark.pixels

SCRIPT_PROLOGUE = """
import sys
import numpy as np
import fastvgg
from fastvgg import backend, oracle
from fastvgg.transform import Transform

image = np.random.default_rng(0).integers(0, 256, (1, 31, 17, 3), np.uint8)

def check(mode="caffe", x=image, **how):
    y = fastvgg.preprocess(x, mode, **how)
    assert y.tobytes() == oracle.apply(Transform(mode), x).tobytes()

def has_started():
    return "numba" in sys.modules
"""


def test_small_batches_do_not_import_numba():
    run_script(
        SCRIPT_PROLOGUE
        + "for mode in ('caffe', 'tf', 'torch'):\n    check(mode)\nassert not has_started()"
    )


@pytest.mark.compiled
def test_explicit_numba_backend_compiles_on_the_first_call():
    run_script(SCRIPT_PROLOGUE + "check(backend='numba')\nassert has_started()")


@pytest.mark.compiled
def test_kernel_is_compiled_once_accumulated_numpy_time_exceeds_its_cost():
    run_script(
        SCRIPT_PROLOGUE
        + "backend.NUMBA_START_SECONDS, backend.COMPILE_SECONDS = 0.0, 0.05\n"
        + "check()\n"
        + "assert not has_started()\n"
        + "for number in range(10_000):\n"
        + "    if has_started():\n"
        + "        break\n"
        + "    check()\n"
        + "assert 1 < number < 9_999, number\n"
    )


@pytest.mark.compiled
def test_numba_start_is_amortized_by_all_work_and_each_kernel_by_its_own():
    run_script(
        SCRIPT_PROLOGUE
        + "backend.NUMBA_START_SECONDS, backend.COMPILE_SECONDS = float('inf'), 0.0\n"
        + "check(x=np.repeat(image, 100, axis=0))\n"
        + "assert not has_started()\n"
        + "backend.NUMBA_START_SECONDS = 0.0\n"
        + "check()\n"
        + "assert has_started()\n"
        + "from fastvgg.kernels import convert\n"
        + "compiled = convert.compile_kernel.cache_info().currsize\n"
        + "assert compiled == 1\n"
        + "backend.NUMBA_START_SECONDS, backend.COMPILE_SECONDS = float('inf'), 1e-6\n"
        + "check('tf', image[:, :1, :1])\n"  # Numba has started, but the work is tiny
        + "assert convert.compile_kernel.cache_info().currsize == 1\n"
        + "check('tf', np.repeat(image, 100, axis=0))\n"
        + "assert convert.compile_kernel.cache_info().currsize == 2\n"
    )


@pytest.mark.compiled
def test_packing_does_not_count_toward_compilation():
    run_script(
        SCRIPT_PROLOGUE
        + "large = np.repeat(image, 100, axis=0)\n"
        + "pack = Transform('identity', 'pack')\n"
        + "assert (pack(large) == large).all()\n"
        + "backend.NUMBA_START_SECONDS, backend.COMPILE_SECONDS = 1e-5, 0.0\n"
        + "assert backend.choose_for_size('auto', 0, 1) == 'numpy'\n"
        + "assert not has_started()\n"
    )


@pytest.mark.compiled
def test_compiled_kernel_is_used_for_calls_of_any_size():
    run_script(
        SCRIPT_PROLOGUE
        + "check(backend='numba')\n"
        + "work, other = (backend.workload(Transform(m), 'uint8') for m in ('caffe', 'tf'))\n"
        + "assert backend.choose('auto', work, 1, 1) == 'numba'\n"
        + "assert backend.choose('auto', other, 1, 1) == 'numpy'\n"
    )


@pytest.mark.compiled
def test_large_call_compiles_immediately():
    run_script(
        SCRIPT_PROLOGUE
        + "backend.NUMBA_START_SECONDS, backend.COMPILE_SECONDS = 1e-3, 1e-4\n"
        + "large = np.repeat(image, 800, axis=0)\n"  # 6 MB in and out: 6 ms at the assumed rate
        + "check(x=large, threads=1)\n"
        + "assert has_started()\n"
    )


@pytest.mark.compiled
def test_choose_for_considers_the_total_work():
    run_script(
        SCRIPT_PROLOGUE
        + "assert backend.choose_for_size('auto', 10**6, 1) == 'numpy'\n"
        + "assert not has_started()\n"
        + "assert backend.choose_for_size('auto', 10**10, 1) == 'numba'\n"
        + "assert has_started()\n"
        + "assert backend.choose_for_size('numpy', 10**10, 1) == 'numpy'\n"
        + "assert backend.choose_for_size('numba', 0, 1) == 'numba'\n"
        + "cheaper = int(2 * backend.COMPILE_SECONDS / backend.ORACLE_SECONDS_PER_BYTE)\n"
        + "assert backend.choose_for_size('auto', cheaper, 1) == 'numba'\n"
        + "assert backend.choose_for_size('auto', cheaper, 4) == 'numpy'\n"
    )


@pytest.mark.compiled
def test_small_plans_run_on_numpy_and_large_plans_on_numba(tmp_path):
    run_script(
        SCRIPT_PROLOGUE
        + f"import os\nos.chdir({str(tmp_path)!r})\n"
        + "np.save('x.npy', image)\n"
        + "plan = fastvgg.plan('x.npy', 'y.npy', mode='caffe')\n"
        + "plan.run()\n"
        + "assert not has_started()\n"
        + "header = np.lib.format.open_memmap('large.npy', 'w+', np.uint8, (6000, 224, 224, 3))\n"
        + "large = fastvgg.plan('large.npy', 'z.npy', mode='caffe', threads=1)\n"
        + "assert not has_started()\n"
        + "assert large.choose_backend() == 'numba'\n"
    )


def test_an_unknown_backend_is_rejected():
    with pytest.raises(UsageError, match="unknown backend 'cuda'"):
        backend.check_backend("cuda")
    with pytest.raises(UsageError, match="unknown backend 'cuda'"):
        backend.choose("cuda", backend.Workload(), 0, 1)
    with pytest.raises(UsageError, match="unknown backend 'cuda'"):
        backend.choose_for_size("cuda", 0, 1)


# A forked child has no other threads: locks that they hold during the fork are never released.
FORK = (
    SCRIPT_PROLOGUE
    + """
import os, threading, warnings
warnings.simplefilter("ignore")  # Python warns of forks in a process that has threads
modes = [fastvgg.Mode(f"own {n}", mean=(n, 2.0, 3.0), std=(1.5,) * 3) for n in range(3)]
modes += [fastvgg.Mode("others", divide=3.0), fastvgg.Mode("bgr", divide=7.0, order="BGR")]

def compile_all():
    for mode in modes:
        fastvgg.preprocess(image, mode, backend="numba")

check("tf")  # triggers the lazy imports
other = threading.Thread(target=compile_all)
other.start()
children = []
while other.is_alive():
    if len(children) < 6 and (has_started() or not children):
        child = os.fork()
        if not child:
            signal_if_stuck()
            check("torch", backend="numba")
            os._exit(0)
        children.append(child)
other.join()
assert children
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""
)
ALARM_IF_STUCK = """
import signal
def signal_if_stuck():
    signal.alarm(120)
"""


@pytest.mark.compiled
def test_child_forked_during_compilation_can_compile():
    run_script(ALARM_IF_STUCK + FORK)


FORK_IN_THE_FIRST_CALL = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore")  # Python warns of forks in a process that has threads
import fastvgg

{prepare}

reached, forking = threading.Event(), threading.Event()


def pause():
    '''Let the main thread fork now; it waits here, or for a lock of this thread.'''
    if threading.current_thread() is not threading.main_thread() and not reached.is_set():
        reached.set()
        assert forking.wait(60)
        import logging
        logging.getLogger("needs a lock that the fork also waits for")


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {moment!r}:
            pause()


def call():
    {call}


def compute():
    import numpy as np
    x = np.arange(630, dtype=np.uint8).reshape(2, 5, 7, 9)[..., :3]
    fastvgg.Transform("caffe", dtype="float16")(x)
    y = fastvgg.preprocess(x, "identity", dtype="float16", backend="{backend}")
    assert y.tobytes() == x.astype("float16").tobytes()


sys.meta_path.insert(0, Finder())
{hook}
other = threading.Thread(target=call)
other.start()
assert reached.wait(60)
os.register_at_fork(before=forking.set)  # the first hook that runs
child = os.fork()
if not child:
    signal.alarm(60)  # a child that waits for a thread that it does not have would wait forever
    call()
    os._exit(0)
other.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
# Numba has LLVM parse what it compiles, and holds its own lock meanwhile.
COMPILATION_HOOK = """
import llvmlite.binding

parse_assembly = llvmlite.binding.parse_assembly

def pause_and_parse(*arguments, **settings):
    pause()
    return parse_assembly(*arguments, **settings)

llvmlite.binding.parse_assembly = pause_and_parse
"""
MOMENTS = {
    "import of the engine": ("", "fastvgg.engine", "numpy", ""),
    "import of what the engine needs": ("", "ml_dtypes", "numpy", ""),
    "import of Numba": (
        "fastvgg.preprocess, fastvgg.Transform",
        "numba.extending",
        "numba",
        "",
    ),
    "compilation": ("fastvgg.Transform", "", "numba", COMPILATION_HOOK),
}
PACKAGES = {"h5py": ("h5py._hl.files", "x.h5::/x"), "zarr": ("zarr.core.array", "x.zarr")}


@pytest.mark.compiled
@pytest.mark.parametrize("moment", MOMENTS)
def test_child_forked_during_the_first_call_of_another_thread_does_not_hang(moment):
    prepare, module, backend, hook = MOMENTS[moment]
    script = FORK_IN_THE_FIRST_CALL.format(
        prepare=prepare, moment=module, backend=backend, hook=hook, call="compute()"
    )
    done = python(script)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("package", PACKAGES)
def test_child_forked_while_another_thread_imports_a_format_does_not_hang(tmp_path, package):
    module, name = PACKAGES[package]
    source = save_npy(tmp_path / "x.npy", pixels(3))
    script = FORK_IN_THE_FIRST_CALL.format(
        prepare="fastvgg.plan",
        moment=module,
        backend="numpy",
        hook="",
        call=f"fastvgg.plan({str(source)!r}, {str(tmp_path / name)!r}, mode='tf')",
    )
    done = python(script)
    assert (done.returncode, done.stderr) == (0, "")


EVERY_COMPILATION = """
import llvmlite.binding
from fastvgg.fork_lock import fork_lock

parse_assembly, found = llvmlite.binding.parse_assembly, []

def check_and_parse(*arguments, **settings):
    found.append(fork_lock._is_owned())
    return parse_assembly(*arguments, **settings)

llvmlite.binding.parse_assembly = check_and_parse
import numpy as np
import fastvgg
from fastvgg.bench import memory
from fastvgg.imaging.resize import gather_function

fastvgg.preprocess(np.zeros((2, 4, 4, 3), np.uint8), "tf", backend="numba")
gather_function("numba")
arena = memory.Arena(2**20)
memory.measure_bandwidth(arena, 1, 2)
assert len(found) > 5, found
assert all(found), found
"""


@pytest.mark.compiled
def test_every_compilation_holds_the_lock_that_a_fork_waits_for():
    run_script(EVERY_COMPILATION)


LATE_THREADS_SCRIPT = (
    SCRIPT_PROLOGUE
    + """
import atexit, threading
large = np.repeat(image, 4000, axis=0)  # several tiles

def work(name):
    for how in ({names}):
        check("tf", large, threads=3, backend=how)
    print(name, flush=True)

def outlive():
    threading.main_thread().join()
    work("thread")

atexit.register(work, "exit handler")
threading.Thread(target=outlive).start()
{first}
"""
)


@pytest.mark.parametrize("first", ["", "check('caffe', large, threads=3)"])
def test_exit_handlers_and_threads_that_outlive_the_main_thread_can_run(first, request):
    names = '"numpy",' if request.config.getoption("--without-numba") else '"numpy", "numba"'
    printed = run_script(LATE_THREADS_SCRIPT.format(names=names, first=first))
    assert printed.splitlines() == ["thread", "exit handler"]
