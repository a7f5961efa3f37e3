"""Chunks on several threads: in order, with the caller's modes, and without a trace."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from lit_merge.vectors.global_value import Statistic
from lit_merge.vectors.threads import chunk_threads, in_worker, ordered_map


@pytest.fixture(autouse=True)
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)


def test_results_come_in_order_from_several_threads():
    together = threading.Barrier(3)

    def work(number):
        together.wait(timeout=60)  # three jobs at once, or this fails
        return number, in_worker(), torch.get_num_threads()

    assert list(ordered_map(work, ((number,) for number in range(9)))) == [(number, True, 1) for number in range(9)]
    assert not in_worker()


def test_many_cores_do_not_mean_as_many_chunks_in_memory():
    torch.set_num_threads(40)
    threads = set(ordered_map(lambda _: threading.get_ident(), ((n,) for n in range(400))))
    assert len(threads) <= chunk_threads() == 16
    assert torch.get_num_threads() == 40
    torch.set_num_threads(3)


def test_one_thread_and_a_worker_use_a_plain_loop():
    def nested(number):
        return list(ordered_map(lambda inner: (inner, threading.get_ident()), [(1,), (2,)])), threading.get_ident()

    for inner, thread in ordered_map(nested, [(1,), (2,)]):
        assert inner == [(1, thread), (2, thread)]
    torch.set_num_threads(1)
    assert list(ordered_map(lambda number: (number, in_worker()), [(4,), (5,)])) == [(4, False), (5, False)]
    torch.set_num_threads(3)


def test_jobs_are_taken_as_results_are():
    taken = []

    def jobs():
        for number in range(100):
            taken.append(number)
            yield (number,)

    results = ordered_map(lambda number: number, jobs())
    assert next(results) == 0
    assert len(taken) <= 5
    results.close()
    assert len(taken) <= 5


@pytest.mark.parametrize("inference", [False, True])
def test_modes_are_those_of_the_caller_but_gradients_are_off(inference):
    weight = torch.ones(2, requires_grad=True)

    def work(number):
        result = weight * number
        return result.requires_grad, torch.is_inference(result)

    with torch.inference_mode(inference):
        assert list(ordered_map(work, [(1,), (2,)])) == [(False, inference)] * 2


def test_an_error_is_raised_in_its_place():
    def work(number):
        if number == 2:
            raise ValueError("two")
        return number

    results = ordered_map(work, ((number,) for number in range(6)))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_a_statistic_is_computed_once_by_all_threads_together():
    calls = []

    def compute():
        assert not in_worker()
        calls.append(1)
        return sum(ordered_map(lambda number: number, [(1,), (2,), (3,)]))

    statistic = Statistic("a sum", 1, compute)
    assert list(ordered_map(lambda number: number * statistic(), [(number,) for number in range(8)])) == [
        6 * number for number in range(8)
    ]
    assert calls == [1]


def test_a_child_process_has_threads_of_its_own():
    assert list(ordered_map(lambda number: number, [(1,), (2,)])) == [1, 2]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(3)
        right = list(ordered_map(lambda number: number, [(1,), (2,)])) == [1, 2]
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
