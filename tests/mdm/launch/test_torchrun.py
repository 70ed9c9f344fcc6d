"""How torchrun is asked, and what becomes of processes that end: started again where one has died, not where it said why."""

import argparse
import os
import signal
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from mdm.config import UserError
from mdm.launch import torchrun


def test_preemption_is_passed_on_and_waited_for_unless_the_user_says_otherwise(monkeypatch):
    launched, given = torchrun.read(["--nproc_per_node", "2", "pretrain", "a=1"])
    assert given == {"nproc_per_node"}
    assert launched.training_script_args == ["a=1"]
    known = {action.dest for action in torchrun.torchrun.get_args_parser()._actions}
    if "signals_to_handle" in known:
        assert launched.signals_to_handle == "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
        assert torchrun.read(["--signals-to-handle", "SIGTERM", "x"])[0].signals_to_handle == "SIGTERM"
        monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "SIGINT")
        assert torchrun.read(["x"])[0].signals_to_handle == "SIGINT"
    if "shutdown_timeout" in known:
        assert launched.shutdown_timeout == 300
        assert torchrun.read(["--shutdown-timeout", "7", "x"])[0].shutdown_timeout == 7
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")
        assert torchrun.read(["x"])[0].shutdown_timeout is None  # torch reads the variable itself


def test_machines_that_meet_nowhere_are_one_line():
    for nodes in ("2", "1:8"):
        with pytest.raises(UserError, match=rf"^--nnodes {nodes}: say where the machines meet, as in --rdzv_backend c10d"):
            torchrun.read(["--nnodes", nodes, "pretrain"])
        torchrun.read(["--nnodes", nodes, "--rdzv_endpoint", "host:1", "pretrain"])


@pytest.mark.parametrize("count", ["two", "0"])
@pytest.mark.parametrize(("flag", "form"), [("nproc_per_node", "processes a machine has"), ("nnodes", "machines there are")])
def test_a_count_that_is_none_is_said_and_what_to_write(flag, form, count):
    with pytest.raises(UserError, match=f"^--{flag} {count}: write how many {form}, as in "):
        torchrun.read([f"--{flag}", count, "pretrain"])


def test_an_earlier_torchs_flags_are_enough(monkeypatch):
    earlier = argparse.ArgumentParser(add_help=False)
    earlier.add_argument("--nnodes", default="1:1")
    earlier.add_argument("training_script")
    earlier.add_argument("training_script_args", nargs=argparse.REMAINDER)
    monkeypatch.setattr(torchrun.torchrun, "get_args_parser", lambda: earlier)
    launched, given = torchrun.read(["--nnodes", "1", "pretrain"])
    assert (launched.nnodes, given, launched.training_script) == ("1", {"nnodes"}, "pretrain")
    assert not hasattr(launched, "shutdown_timeout")


MEANT = {
    "a mistake": ([2, -15], 2),
    "a mistake, and another that lost it": ([1, 2], 2),
    "a death that another could not save through": ([2, -9], None),
    "all were told to leave": ([143, 143], 143),
    "one had not begun": ([143, -15], 143),
    "a bug, and the others were ended": ([1, 143], None),
    "Ctrl-C": ([130, 1], 130),
    "a mistake, while others were interrupted": ([130, 2], 2),
    "a death": ([-9, -15], None),
    "a bug": ([1, -15], None),
    "all were ended": ([-15], None),
    "none": ([], None),
}


@pytest.mark.parametrize("case", MEANT)
def test_what_processes_end_with_is_told_from_a_death(case):
    codes, code = MEANT[case]
    assert torchrun.meant(codes) == code


@pytest.mark.parametrize(
    ("codes", "nodes", "left"),
    [([], (1, 1), 3), ([-9, 1], (1, 1), 3), ([2, -15], (1, 8), 0), ([143], (2, 2), 0), ([143], (1, 8), 3), ([130], (1, 1), 0)],
)
def test_what_a_user_has_to_mend_is_not_started_again(monkeypatch, codes, nodes, left):
    """Nor what was told to leave, but for the machines that are left of an elastic run."""
    result = SimpleNamespace(failures={i: SimpleNamespace(exitcode=code) for i, code in enumerate(codes)})
    monkeypatch.setattr(torchrun.Agent.__base__, "_monitor_workers", lambda self, group: result)
    agent = object.__new__(torchrun.Agent)
    settings = SimpleNamespace(min_nodes=nodes[0], max_nodes=nodes[1])
    agent._worker_group = SimpleNamespace(spec=SimpleNamespace(rdzv_handler=SimpleNamespace(settings=settings)))
    agent._remaining_restarts = 3
    assert agent._monitor_workers(None) is result
    assert agent._remaining_restarts == left


def test_a_second_signal_reaches_the_processes_too(monkeypatch):
    """They are sessions of their own: what ends while it waits for them would leave them behind."""
    sent = []

    def shutdown(self, death_sig, timeout):
        sent.append((death_sig, timeout))
        if len(sent) == 1:
            raise SignalException("", signal.SIGINT)

    monkeypatch.setattr(torchrun.Agent.__base__, "_shutdown", shutdown)
    object.__new__(torchrun.Agent)._shutdown(signal.SIGUSR1, timeout=300)
    assert sent == [(signal.SIGUSR1, 300), (signal.SIGINT, 300)]


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGUSR1, 143),
        (signal.SIGINT, 130),
        (signal.SIGHUP, 129),
        ([2, -15], 2),
        ([143, 143], 143),
    ],
)
def test_the_launcher_ends_as_its_processes_did(monkeypatch, tmp_path, raised, code):
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)

    def run(launched):
        assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"  # else the second start finds dead addresses
        if isinstance(raised, signal.Signals):
            raise SignalException("", raised)
        failures = {i: SimpleNamespace(exitcode=c, timestamp=0) for i, c in enumerate(raised)}
        error = ChildFailedError.__new__(ChildFailedError)
        error.failures = failures
        raise error

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(torchrun.torchrun, "run", run)
    monkeypatch.setattr(torchrun, "leave", leave)
    monkeypatch.setattr(torchrun.api, "LocalElasticAgent", torchrun.api.LocalElasticAgent)
    try:
        with pytest.raises(SystemExit) as ended:
            torchrun.start(torchrun.read(["pretrain"])[0], tmp_path / "my.py", [])
    finally:
        os.environ.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    assert ended.value.code == code


def test_a_death_is_raised(monkeypatch, tmp_path):
    error = ChildFailedError.__new__(ChildFailedError)
    error.failures = {0: SimpleNamespace(exitcode=-9, timestamp=0)}

    def run(launched):
        raise error

    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setattr(torchrun.torchrun, "run", run)
    monkeypatch.setattr(torchrun.api, "LocalElasticAgent", torchrun.api.LocalElasticAgent)
    with pytest.raises(ChildFailedError) as raised:
        torchrun.start(torchrun.read(["pretrain"])[0], tmp_path / "my.py", [])
    assert raised.value is error


@pytest.mark.parametrize(
    ("flags", "standalone", "threads"),
    [
        ([], True, None),
        (["--nproc_per_node", "2"], True, "1"),
        (["--nnodes", "1:2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "a:1"], False, None),
        (["--rdzv_endpoint", "a:1"], False, None),
    ],
)
def test_one_machine_meets_nobody_and_several_processes_take_a_thread_each(monkeypatch, tmp_path, flags, standalone, threads):
    seen = []
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # is put back
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(
        torchrun.torchrun, "run", lambda asked: seen.append((asked.standalone, os.environ.get("OMP_NUM_THREADS")))
    )
    monkeypatch.setattr(torchrun.api, "LocalElasticAgent", torchrun.api.LocalElasticAgent)
    torchrun.start(torchrun.read([*flags, "pretrain"])[0], tmp_path / "my.py", [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert seen == [(standalone, threads)]
