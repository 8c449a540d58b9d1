"""The cores that the workers of a CPU server get: all of them, once each, near their memory."""

import pytest

from sparse_rt.workflows import serve_threads
from sparse_rt.workflows.serve_threads import BIND_VARIABLE, CHOOSING, allowed_cores, bind_threads, ranges, share

TWO_NODES = [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.fixture
def cores(monkeypatch):
    return lambda nodes: monkeypatch.setattr(serve_threads, "allowed_cores", lambda: nodes)


@pytest.mark.parametrize(
    "nodes, ranks, value",
    [
        ([[0, 1]], 1, "0-1"),
        ([[0, 1]], 2, "0|1"),
        ([[3]], 1, "3"),
        ([[0, 1, 2, 3, 4]], 2, "0-1|2-4"),
        ([[0, 2, 4, 5, 6]], 1, "0,2,4-6"),
        (TWO_NODES, 2, "0-3|4-7"),
        (TWO_NODES, 4, "0-1|2-3|4-5|6-7"),
        ([[0], [1, 2, 3]], 4, "0|1|2|3"),
    ],
)
def test_every_core_computes(cores, nodes, ranks, value):
    cores(nodes)
    assert bind_threads(ranks, None, {})[0] == value
    assert sorted(cpu for part in share(nodes, ranks) for cpu in part) == sorted(cpu for node in nodes for cpu in node)


def test_one_worker_keeps_to_one_memory_node_and_says_so(cores):
    cores(TWO_NODES)
    value, note = bind_threads(1, None, {})
    assert value == "0-3" and "--tensor-parallel-size 2 would use all 8" in note


def test_more_workers_than_cores_are_left_to_vllm(cores):
    cores([[0, 1]])
    value, note = bind_threads(3, None, {})
    assert value is None and "3 workers share 2 cores" in note


@pytest.mark.parametrize("name", CHOOSING)
def test_a_choice_of_the_user_stays(cores, name):
    cores([[0, 1]])
    assert bind_threads(1, None, {name: "0"}) == (None, "")


def test_several_machines_are_left_to_vllm(cores):
    cores([[0, 1]])
    value, note = bind_threads(1, "--nnodes", {})
    assert value is None and "--nnodes is given" in note and BIND_VARIABLE in note


def test_only_allowed_cores_and_one_thread_of_each(monkeypatch, tmp_path):
    """Four cores with two threads each (0+4, 1+5, ...), cores 2 and 3 on the second node; CPU 7 is not allowed."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}"
        (folder / "topology").mkdir(parents=True)
        (folder / "topology" / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
        (folder / f"node{cpu % 4 // 2}").mkdir()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5, 6}, raising=False)
    assert allowed_cores(tmp_path) == [[4, 5], [3, 6]]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {2}, raising=False)
    assert allowed_cores(tmp_path) == [[2]]
    assert allowed_cores(tmp_path / "no topology") == [[2]]


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and ranges([4]) == "4"
