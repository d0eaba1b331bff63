"""Trials on several nodes: Ray's own cluster of two on this machine, of which some go away in mid-search."""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from problems import DEVICE, SPACE, Watched, essence, payload
from ray.cluster_utils import Cluster

from tightrope.search import journal
from tightrope.search.distribute import Payload, RayPool
from tightrope.search.study import Study
from tightrope.spaces import Budget, Policy, Score
from tightrope.spaces.errors import RunError

BUDGET = Budget.parse("latency<=0.2x")


class Placed(Watched):
    """Writes down its node for each policy."""

    def __init__(self, payload: Payload) -> None:
        super().__init__(payload)
        self.nodes = Path(payload["nodes"].tobytes().decode())
        self.node = ray.get_runtime_context().get_node_id()

    def evaluate(self, policy: Policy) -> Score:
        found = super().evaluate(policy)
        with self.nodes.open("a") as file:
            file.write(f"{self.node}\n")
        return found


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without a core for workers; it soon notices that a node is gone."""
    quick = {"health_check_period_ms": 200, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 0}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # sockets' names must be short
        monkeypatch.setenv("RAY_TMPDIR", folder)  # where other processes do not look for a cluster
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick, "include_dashboard": False})
        yield found
        ray.shutdown()
        found.shutdown()


def begin(cluster: Any, folder: Path, workers: int) -> tuple[RayPool, Study]:
    values = payload(sleep=0.05) | {"nodes": payload(log=folder / "nodes")["log"]}
    executor = RayPool(Placed, values, workers=workers, address=cluster.address, patience_seconds=60)
    return executor, Study.start(SPACE, DEVICE, BUDGET, executor, folder=folder, agent="nsga2", trials=60)


@contextmanager
def running(study: Study, executor: RayPool) -> Iterator[None]:
    """Run a search beside what is done to its cluster, and wait for it."""
    thread = threading.Thread(target=study.run, args=[executor])
    thread.start()
    yield
    thread.join()


def seen(folder: Path) -> list[str]:
    """The node of each policy scored."""
    return (folder / "nodes").read_text().split() if (folder / "nodes").exists() else []


def wait(folder: Path, policies: int, nodes: int) -> None:
    """Return when so many policies were scored on so many nodes."""
    while len(set(seen(folder))) < nodes or len(seen(folder)) < policies:
        time.sleep(0.01)


def complete(study: Study, folder: Path) -> bool:
    return essence(journal.read(folder).trials) == essence(study.trials) and [t.number for t in study.trials] == [*range(60)]


def test_a_search_goes_on_where_a_node_is_gone_and_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    executor, study = begin(cluster, tmp_path, 2)
    with study, running(study, executor):
        wait(tmp_path, 10, 2)
        cluster.remove_node(nodes[1], allow_graceful=False)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    assert len(set(seen(tmp_path))) == 2 and set(seen(tmp_path)[-10:]) < alive
    assert complete(study, tmp_path) and not any(t.failed for t in study.trials)
    executor.close()


def test_where_no_node_is_left_it_waits_for_another_as_long_as_it_has_patience(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    executor, study = begin(cluster, tmp_path, 1)
    with study, running(study, executor):
        wait(tmp_path, 10, 1)
        cluster.remove_node(node, allow_graceful=False)
        node = cluster.add_node(num_cpus=1)
    assert len(set(seen(tmp_path))) == 2 and complete(study, tmp_path)

    executor._patience = 1.0
    cluster.remove_node(node, allow_graceful=False)
    while sum(node["Alive"] for node in ray.nodes()) > 1:  # besides the head
        time.sleep(0.05)
    executor.submit(0, SPACE.dense)
    for _ in range(2):
        with pytest.raises(RunError, match="no worker is left, and there was no core for another within 1 s"):
            executor.next()
    executor.close()
