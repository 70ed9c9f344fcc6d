"""Samples that other processes prepare are those that the run would have made."""

import os
import signal
import time

import pytest
import torch

from components.data.bad import BadSample, Noted, Refused
from components.data.draws.endless import Draws, Placed, Prepared, Streamed
from components.data.draws.order import WholeOrder
from components.data.draws.workers import Workers
from components.data.indexed import Iterated
from components.data.nodes import MicroBatches, Mix, Stream
from tests.components.test_nodes import Lines


def prepare(sample):
    if sample == 5:
        raise ValueError("it is five")
    if sample == 1000:
        raise Refused("it is a thousand")
    if sample == 2000:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"image": torch.full((3,), sample), "made by": os.getpid()}


@pytest.fixture
def workers():
    made = Workers(2)
    yield made
    if made._pool is not None:
        made._pool.shutdown(cancel_futures=True)


def plain(item):
    if isinstance(item, Noted):
        return plain(item.sample), [(n.name, n.why) for n in item.notes]
    return str(item) if isinstance(item, BadSample) else item["image"].tolist()


def test_placed_samples_are_the_same_in_the_same_order(workers):
    alone, ahead = Prepared(range(40), prepare), workers.prepared("photos", range(40), prepare)
    workers.start()
    order = WholeOrder(40, 0)
    one, other = Placed(alone, order), Placed(ahead, order)
    other.ahead(range(30))
    made = [other(place) for place in range(60)]  # half of them announced
    assert [plain(item) for item in made] == [plain(one(place)) for place in range(60)]
    pids = {(item.sample if isinstance(item, Noted) else item)["made by"] for item in made}
    assert os.getpid() in pids
    assert len(pids) > 1
    assert not ahead._coming  # what was drawn is not held


def test_a_lane_and_its_state_are_the_same(workers):
    ahead = workers.prepared("text", range(40), prepare)
    workers.start()
    node, again = (
        Draws(ahead, WholeOrder(40, 0), 4, 1),
        Draws(Prepared(range(40), prepare), WholeOrder(40, 0), 4, 1),
    )
    first = [plain(next(node)) for _ in range(12)]
    assert first == [plain(next(again)) for _ in range(12)]
    assert node.state_dict() == again.state_dict()


def test_each_sample_of_a_lane_is_asked_for_once_and_those_that_it_draws_next(workers):
    asked = []
    ahead = workers.prepared("text", range(100), prepare)
    workers.submit = lambda key, indices: asked.append(list(indices)) or indices
    order = WholeOrder(100, 0)
    node = Draws(ahead, order, 4, 1, ahead=3)
    drawn = [next(node) for _ in range(4)]
    assert drawn[1:] == [order(1 + 4 * k) for k in (1, 2, 3)]  # the first was not announced
    assert asked == [[order(1 + 4 * k) for k in (1, 2, 3)], *([order(1 + 4 * k)] for k in (4, 5, 6))]


def test_workers_are_deaf_to_the_terminal(workers):
    ahead = workers.prepared("photos", range(8), prepare)
    workers.start()
    for pid in workers._pool._processes:
        os.kill(pid, signal.SIGINT)
    ahead.ahead(range(8))
    assert [plain(ahead[i]) for i in range(4)] == [[i] * 3 for i in range(4)]


@pytest.mark.parametrize("wrapped", [False, True])
def test_streamed_rows_are_decoded_and_prepared_elsewhere(workers, wrapped):
    def dataset():
        lines = Lines([*range(30)])
        return Iterated(lines, lambda row, name: row + 100 if row != 7 else prepare(5), "web") if wrapped else lines

    begin = workers.rows("web", dataset(), prepare)
    workers.start()
    here, there = Streamed(dataset(), 0, 12, prepare), Streamed(dataset(), 0, 12, prepare, begin)
    found = [next(there) for _ in range(70)]
    assert [plain(item) for item in found] == [plain(next(here)) for _ in range(70)]
    assert os.getpid() not in {item["made by"] for item in found if not isinstance(item, BadSample)}
    again = Streamed(dataset(), 0, 12, prepare, begin)
    again.reset(there.state_dict())
    assert [plain(next(again)) for _ in range(5)] == [plain(next(here)) for _ in range(5)]


def test_the_rows_of_the_next_step_are_announced(workers, vocabulary):
    asked = []
    ahead = workers.prepared("photos", range(40), prepare)
    ahead.ahead = lambda indices: asked.append(list(indices))
    stream = Stream("photos", Placed(ahead, WholeOrder(40, 0)), 1, lambda item, rng: [])
    node = MicroBatches(Mix([stream], 0), 8, 8, vocabulary.pad_id, rank=1, world_size=2)
    for _ in range(2):
        next(node)
    order = WholeOrder(40, 0)
    assert asked == [[order(r) for r in range(1, 16, 2)], [order(r) for r in range(9, 24, 2)]]


def test_what_is_refused_there_ends_the_run_here_and_so_does_a_worker_that_dies(workers):
    ahead = workers.prepared("photos", [1, 1000, 2000], prepare)
    workers.start()
    ahead.ahead([0, 1])
    assert plain(ahead[0]) == [1, 1, 1]
    with pytest.raises(Refused, match="sample 1: it is a thousand"):
        ahead[1]
    ahead.ahead([2])
    with pytest.raises(Refused, match=r"^a process that prepares samples has ended, .* data_workers=0"):
        ahead[2]
    with pytest.raises(Refused, match=r"^a process that prepares samples has ended"):
        ahead.ahead([0])


def test_workers_end_with_the_run_that_began_them():
    """Killed, it can tell them nothing."""
    reader, writer = os.pipe()
    run = os.fork()
    if run == 0:
        made = Workers(2)
        made.prepared("x", [1], prepare)
        made.start()
        os.write(writer, " ".join(map(str, made._pool._processes)).encode())
        time.sleep(60)
    pids = [int(pid) for pid in os.read(reader, 100).split()]
    assert len(pids) == 2
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    left = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < left:
        time.sleep(0.2)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
