"""Processes of a run: the group that a launcher has made, and what becomes of them without their launcher."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from mdm.hardware import MeshSettings, hardware
from mdm.hardware.processes import end_with_the_launcher
from tests.processes import in_processes


def in_a_group_of_somebody_elses():
    dist.init_process_group("gloo")
    for _ in range(2):
        with hardware("cpu", "fp32", MeshSettings()) as hw:
            total = hw.sum(torch.tensor([1.0, hw.rank])).tolist()
        assert dist.is_initialized()
    return total


def test_a_group_that_exists_is_kept_and_left_to_whom_it_belongs():
    assert in_processes(2, in_a_group_of_somebody_elses) == [[2.0, 1.0]] * 2


def of_a_mesh():
    with hardware("cpu", "fp32", MeshSettings(tensor=2)) as hw:
        counts = hw.sum(torch.tensor([1.0, hw.data_rank])), hw.sum(torch.tensor(3))
        return [c.tolist() for c in counts], hw.gather([hw.data_rank]), (hw.data_rank, hw.data_ranks)


def test_what_processes_of_the_same_rows_see_counts_once():
    for rank, (sums, gathered, share) in enumerate(in_processes(4, of_a_mesh)):
        assert sums == [[2.0, 1.0], 6]
        assert gathered == [0, 1]
        assert share == (rank // 2, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux is asked")
def test_a_process_is_asked_to_end_when_its_launcher_has_died(tmp_path):
    launcher = os.fork()
    if not launcher:
        if not os.fork():
            signal.signal(signal.SIGTERM, lambda *_: ((tmp_path / "asked").touch(), os._exit(0)))
            end_with_the_launcher()
            (tmp_path / "ready").touch()
            time.sleep(20)
        time.sleep(20)
        os._exit(1)
    for name in ("ready", "asked"):
        deadline = time.monotonic() + 10
        while not (tmp_path / name).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if name == "ready":
            os.kill(launcher, signal.SIGKILL)
            os.waitpid(launcher, 0)
    assert (tmp_path / "asked").exists()
