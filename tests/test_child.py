"""A process of its own: results and errors come back, the object stays between calls, nothing is left behind."""

import os
import time

import pytest

from sparse_rt.benchmarking.processes import largest_process, session_members, status_bytes, wait_until_idle
from sparse_rt.child import Child, in_fresh_process
from sparse_rt.errors import SparseRTError, UserError


def test_a_function_runs_in_another_interpreter():
    assert in_fresh_process("sparse_rt.config:parse_assignments", ["a=1"]) == {"a": 1}
    assert in_fresh_process("os:getpid") != os.getpid()


def test_errors_keep_their_class_and_their_sentence():
    with pytest.raises(UserError, match="'nonsense': write KEY=VALUE"):
        in_fresh_process("sparse_rt.config:parse_assignments", ["nonsense"])
    with pytest.raises(SparseRTError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        in_fresh_process("no_such_module:function")


def test_the_object_stays_between_calls_and_the_process_survives_an_error():
    with Child("counting") as child:
        child.make("collections:deque", [1, 2])
        child.ask("append", 3)
        with pytest.raises(SparseRTError, match="ValueError"):
            child.ask("remove", 7)
        assert [child.ask("popleft") for _ in range(3)] == [1, 2, 3]


def test_what_libraries_print_does_not_disturb_the_answers():
    with Child("printing") as child:
        child.call("builtins:print", '{"result": "not an answer"}')
        assert child.call("os:system", "echo from a process of its own") == 0
        assert child.call("builtins:len", "abc") == 3


def test_the_environment_is_that_of_the_process():
    name = "SPARSE_RT_TEST_CHILD"
    assert in_fresh_process("os:getenv", name, environment={name: "inside"}) == "inside"
    assert name not in os.environ


def test_a_process_that_dies_is_reported_with_its_last_words():
    message = r"the dying process died \(exit code 3\): it wrote nothing"
    with Child("the dying process") as child, pytest.raises(SparseRTError, match=message):
        child.call("os:_exit", 3)
    with Child("the talking process") as child, pytest.raises(SparseRTError, match="exit code 1.*out of luck"):
        child.call("sys:exit", "out of luck")


def test_a_process_that_does_not_answer_is_given_up():
    start = time.monotonic()
    with Child("the slow process") as child, pytest.raises(SparseRTError, match="did not answer in 1 seconds"):
        child.call("time:sleep", 3, timeout=1)
    assert time.monotonic() - start < 30


def test_what_the_process_started_ends_with_it():
    with Child("a parent") as child:
        child.call("os:system", "sleep 600 &")
        session = child.pid
        assert len(session_members(session)) == 2
    end = time.monotonic() + 10
    while session_members(session) and time.monotonic() < end:
        time.sleep(0.05)
    assert session_members(session) == []


def test_an_idle_process_is_told_from_a_busy_one():
    with Child("the idle process") as child:
        child.call("builtins:len", "abc")
        assert wait_until_idle(child.pid)
        assert status_bytes("VmRSS", largest_process(child.pid)) > 1e6
        child.call("os:system", "while true; do true; done &")
        assert not wait_until_idle(child.pid, longest=1.0)
