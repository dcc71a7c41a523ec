"""Every peer of compare_peers.py on its own, to compare two versions of the code.

    python -m pytest benchmarks --benchmark-only -k caffe --benchmark-autosave
    python -m pytest benchmarks --benchmark-only -k caffe --benchmark-compare

For ratios between peers use compare_peers.py, which interleaves them: here they run one after
another, so a disturbance of the machine affects only one. `KERAS_BACKEND=torch` in the environment
adds Keras on tensors of that backend.
"""

import functools
import os

import pytest
from peers import PEERS, import_peers
from peers.configurations import MEMORIES, STYLES, configurations
from peers.task import TASKS, difference, images

pytestmark = pytest.mark.filterwarnings("default")  # from other libraries


@pytest.fixture(scope="module", params=TASKS, ids=lambda name: name.replace(", ", "-"))
def task(request):
    option = request.config.getoption
    return TASKS[request.param](request.param, images(option("--images")), option("--threads"))


@functools.cache
def available_peers():
    return import_peers(os.environ["KERAS_BACKEND"])


@pytest.fixture(scope="module", params=PEERS, ids=lambda peer: peer.name)
def configurations_by_style(request, task):
    """Return the configurations of a peer for a task, by style and memory."""
    peer = request.param
    present, _, missing = available_peers()
    if peer.name in missing:
        pytest.skip(f"cannot be imported: {missing[peer.name]}")
    if peer not in present:
        pytest.skip(f"requires KERAS_BACKEND={peer.backend}")
    implementation = peer.implementation_for(task)
    if implementation is None:
        pytest.skip("does not support this task")
    return {
        (each.style, each.memory): each for each in configurations(peer.name, implementation, task)
    }


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("style", STYLES)
def test_peer(benchmark, task, configurations_by_style, style, memory):
    configuration = configurations_by_style.get((style, memory))
    if configuration is None:
        pytest.skip("not supported by its API")
    configuration.prepare()
    task.out.fill(0)
    differing, _ = difference(configuration.call(), task.expected)
    benchmark.group = task.name
    benchmark.extra_info |= {
        "images": len(task.x),
        "useful_bytes": task.useful_bytes,
        "differing": differing,
    }
    benchmark(configuration.call)
    assert differing == 0 or configuration.peer != "fastvgg"
