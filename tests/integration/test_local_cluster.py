"""The cluster of --dask local: who can reach it, and that it computes the same bytes."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

import psutil
import pytest
from distributed import Client, Security
from typer.testing import CliRunner

import fastvgg
from fastvgg import cli
from fastvgg.errors import UsageError
from fastvgg.executors import dask as cluster
from tests.helpers.datasets_on_disk import check_error, names_in, pixels, plan_of, python, save_npy

NO_ROUTE = 404


@pytest.fixture(scope="module")
def client():
    with cluster.connect("local") as connected:
        connected.wait_for_workers(1, timeout=60)
        yield connected


def listening_addresses():
    """Return the address of every listening socket of this process and its descendants."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return [
        connection.laddr
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def test_local_cluster_listens_only_on_the_loopback_interface(client):
    workers = len(client.nthreads())
    found = listening_addresses()
    assert {address.ip for address in found} == {"127.0.0.1"}
    # Two of the scheduler; of each worker two, and one of the process that restarts it.
    assert len(found) <= 2 + 3 * workers
    assert 8787 not in {address.port for address in found}


def test_local_cluster_has_no_dashboard_or_other_page(client):
    answers = {}
    for address in listening_addresses():
        for page in ("status", "metrics", "health", "info/main/workers.html", "json/counts.json"):
            try:
                url = f"http://127.0.0.1:{address.port}/{page}"
                answers[url] = urllib.request.urlopen(url, timeout=10).status
            except urllib.error.HTTPError as error:
                answers[url] = error.code
            except OSError:  # not HTTP: it requires a certificate
                continue
    assert set(answers.values()) <= {NO_ROUTE}, answers


@pytest.mark.parametrize("security", [None, "another certificate"])
def test_only_the_client_that_started_a_local_cluster_can_run_code_on_it(client, security):
    address = client.scheduler.address
    assert client.submit(os.getpid).result() != os.getpid()
    worker = next(iter(client.nthreads()))
    for reachable in (address, worker):
        theirs = Security.temporary() if security else None
        plain = reachable if security else reachable.replace("tls://", "tcp://")
        with pytest.raises(OSError, match=r"certificate|handshake|closed|reset|timed out"):
            Client(plain, security=theirs, timeout=3, set_as_default=False).submit(os.getpid)


def test_run_on_a_local_cluster_has_the_same_bytes(client, tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(9))
    plan = plan_of(source, tmp_path / "y.npy", mode="caffe", images_per_chunk=2)
    plan.run(client=client)
    plan_of(source, tmp_path / "z.npy", mode="caffe").run()
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "z.npy").read_bytes()
    assert fastvgg.verify(tmp_path / "y.npy", full=True).recomputed_images == 9


def test_command_line_runs_on_a_local_cluster(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(5))
    arguments = ["preprocess", source, tmp_path / "y.npy", "--mode", "tf", "--dask", "local"]
    result = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    assert fastvgg.verify(tmp_path / "y.npy").images == 5


def test_too_few_open_files_for_a_local_cluster_are_a_refusal(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(5))
    arguments = ["preprocess", source, tmp_path / "y.npy", "--mode", "tf", "--dask", "local"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))"
    done = python(f"{limit}\nfrom fastvgg.cli import main\nmain()", *arguments)
    assert done.returncode == 3
    problem, remedy = done.stderr.splitlines()[-2:]
    assert "a local Dask cluster could not be started" in problem
    assert "ulimit -n" in remedy
    assert names_in(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("address", ["nonsense", "nonsense://x", "127.0.0.1:1"])
def test_address_without_a_scheduler_is_refused_in_two_lines(tmp_path, address):
    source = save_npy(tmp_path / "x.npy", pixels(5))
    arguments = ["preprocess", source, tmp_path / "y.npy", "--mode", "tf", "--dask", address]
    done = python("from fastvgg.cli import main\nmain()", *arguments)
    assert done.returncode == 3
    problem, remedy = done.stderr.splitlines()
    assert f"no scheduler responds at {address}" in problem
    assert "--dask local" in remedy
    assert names_in(tmp_path) == ["x.npy"]


def test_local_cluster_without_the_package_of_certificates_is_rejected(monkeypatch):
    def temporary():
        raise ImportError("Using `Security.temporary` requires `cryptography`")

    monkeypatch.setattr(cluster.Security, "temporary", temporary)
    with pytest.raises(UsageError) as caught, cluster.connect("local"):
        pass
    check_error(caught.value, "cryptography", "pip install '.[dask]'")
