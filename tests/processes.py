"""Processes forked from this one, without the seconds that each takes to import: one, or several as torchrun starts them."""

import contextlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path


def in_processes(count, work, *arguments, seconds=120):
    """What `work(*arguments)` gives in each of `count` processes with the variables of torchrun. Fails with what they raise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(rank, Path(folder), _ranked, (rank, count, port, work, *arguments)) for rank in range(count)]
        return _found(children, Path(folder), seconds)


def in_a_process(work, *arguments, seconds=120):
    """What `work(*arguments)` gives in a process of its own, which is none of torchrun's. Fails with what it raises."""
    with tempfile.TemporaryDirectory() as folder:
        return _found([_fork(0, Path(folder), work, arguments)], Path(folder), seconds)[0]


def begun(work, *arguments):
    """The process id of one that does `work(*arguments)`: for whoever kills it, and waits for it."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _settle()
            work(*arguments)
        os._exit(0)
    return child


def _found(children, folder, seconds):
    deadline, left = time.monotonic() + seconds, set(children)
    try:
        while left and time.monotonic() < deadline:
            left -= {child for child in left if os.waitpid(child, os.WNOHANG)[0]}
            time.sleep(0.01)
    finally:
        for child in left:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    paths = [folder / str(rank) for rank in range(len(children))]
    found = [pickle.loads(path.read_bytes()) if path.is_file() else None for path in paths]
    failed = [f"rank {rank}:\n{result[1]}" for rank, result in enumerate(found) if result and not result[0]]
    assert not failed, "\n".join(failed)
    assert None not in found, f"processes ended, or were killed after {seconds} s: {[f is None for f in found]}"
    return [result[1] for result in found]


def _settle():
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork, nor does one of the compiler's processes
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if (compiler := sys.modules.get("torch._dynamo.config")) is not None:
        compiler.disable = True


def _ranked(rank, count, port, work, *arguments):
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in local.items()})
    return work(*arguments)


def _fork(rank, folder, work, arguments):
    child = os.fork()
    if child:
        return child
    try:
        _settle()
        result = True, work(*arguments)
    except BaseException:
        result = False, traceback.format_exc()
    (folder / "partial").with_name(f"{rank}.partial").write_bytes(pickle.dumps(result))
    os.replace(folder / f"{rank}.partial", folder / str(rank))
    os._exit(0)
