"""Workers of Ray: asked for rightly or in one line, as a process of torchrun would be, and started again where one has died."""

import importlib.util
import io
import os
import sys
from pathlib import Path

import pytest

from mdm.config import UserError
from mdm.launch import ray_train
from tests.recipes.conftest import _here, mdm
from tests.recipes.test_bad_input import one_line

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

RECIPE = '''"""A recipe of a user's, whose second process dies once."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from mdm.config import UserError
from mdm.hardware import hardware
from mdm.recipe import run_recipe

import beside

CONFIG = "my"


@dataclass
class Settings:
    output_dir: str = "out"
    device: str = "cpu"
    die: bool = False
    wrong: bool = False


def validate(cfg):
    if int(os.environ.get("WORLD_SIZE", 1)) == 5:
        raise UserError("five processes cannot share this")


def main(cfg):
    with hardware(cfg.device, "fp32") as hw:
        if cfg.wrong:
            raise UserError("wrong: found out late")
        died = Path(cfg.output_dir) / "died"
        if cfg.die and hw.rank == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        total = hw.sum(torch.tensor([1.0 + hw.rank])).item()
        hw.say(f"{beside.COLOUR} {total} {os.getcwd()} {[os.environ.get(n) for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')]}")


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
'''


@pytest.fixture
def mine(tmp_path):
    """A folder with a recipe, its config, a module beside it, and a package of the library's name that is not its."""
    (tmp_path / "my.py").write_text(RECIPE)
    (tmp_path / "my.yaml").write_text("output_dir: out\ndevice: cpu\ndie: false\nwrong: false\n")
    (tmp_path / "beside.py").write_text("COLOUR = 'blue'\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "components").mkdir()
    (tmp_path / "components" / "__init__.py").touch()
    yield tmp_path
    for name in ("beside", "mdm_recipe_my"):
        sys.modules.pop(name, None)


def test_without_ray_it_is_one_line(monkeypatch, mine):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else found(name, *a))
    line = one_line(_here(["run", "--ray", "16", "my.py"], mine))
    assert line.endswith("--ray 16: Ray is not installed; pip install 'trimodal-mdm[scale]'")


def last_line(done):
    """Of a command that refuses; before it stands what is said of the user's `components`, once a process."""
    assert done.returncode == 2
    *before, last = done.stderr.splitlines()
    assert all("components has the name of this library's" in line for line in before)
    return last


@needs_ray
def test_a_mistake_is_found_before_any_worker_and_as_one_of_so_many_processes(monkeypatch, mine):
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("a cluster was begun"))
    assert "five processes cannot share this" in last_line(_here(["run", "--ray", "5", "my.py"], mine))
    assert "dye" in last_line(_here(["run", "--ray", "2", "my.py", "dye=true"], mine))
    assert "WORLD_SIZE" not in os.environ


@needs_ray
def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch, mine):
    import ray

    def init(**_):
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.1:6379")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    line = last_line(_here(["run", "--ray", "2", "my.py"], mine))
    assert "--ray 2: RAY_ADDRESS=192.0.2.1:6379 cannot be joined (Failed to connect" in line


@needs_ray
@pytest.mark.parametrize(
    ("nodes", "grown", "device", "workers", "gpu"),
    [
        ([{"CPU": 4.0}, {"CPU": 4.0}], {}, "auto", 8, False),
        ([{"CPU": 4.0}, {"CPU": 4.0}], {}, "auto", 9, "each worker takes a CPU, and the cluster has room for 8 of them"),
        ([{"CPU": 4.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}], {}, "auto", 12, True),
        (
            [{"CPU": 4.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}],
            {},
            "auto",
            13,
            "a GPU and a CPU, and the cluster has room for 12",
        ),
        ([{"CPU": 4.0, "GPU": 8.0}, {"CPU": 64.0}], {}, "cpu", 60, False),
        ([{"CPU": 4.0}], {"CPU": 256.0, "GPU": 32.0}, "auto", 32, True),
        ([{"CPU": 4.0}], {"CPU": 256.0, "GPU": 32.0}, "auto", 33, "has room for 32"),
    ],
)
def test_more_workers_than_the_cluster_will_ever_hold_are_one_line(monkeypatch, nodes, grown, device, workers, gpu):
    import ray

    monkeypatch.setattr(
        ray, "nodes", lambda: [*({"Alive": True, "Resources": n} for n in nodes), {"Alive": False, "Resources": {}}]
    )
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 999.0, "GPU": 999.0})
    monkeypatch.setattr(ray_train, "_grown", lambda: grown)
    if isinstance(gpu, bool):
        assert ray_train._placed(workers, device) == gpu
    else:
        with pytest.raises(UserError, match=f"--ray {workers}: .*{gpu}"):
            ray_train._placed(workers, device)


def test_a_bar_becomes_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ray_train.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    lines = ray_train.Lines(out)
    for second in range(25):
        now[0] = float(second)
        lines.write(f"\rtraining: {second}")
    lines.write("\r        \r")  # cleared, for a line above it
    lines.write("a line\n")
    lines.write("\rtraining: 25")
    lines.write("\n")
    assert out.getvalue() == "training: 10\ntraining: 20\na line\ntraining: 25\n"


class Here:
    """In the place of an actor's method, and of `ray.get`."""

    def __init__(self):
        self.end, self.said = self, []

    def remote(self, *said):
        self.said.append(said)


@needs_ray
def test_a_worker_runs_the_recipe_and_tells_a_mistake_instead_of_raising_it(monkeypatch, mine, capsys):
    import ray

    class Waiting(Exception):
        pass

    def sleep(seconds):
        raise Waiting

    told = Here()
    monkeypatch.setattr(ray, "get", lambda asked: None)
    monkeypatch.setattr(ray_train.time, "sleep", sleep)
    for name in ("stdout", "stderr", "argv", "path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)) if name in ("argv", "path") else getattr(sys, name))
    monkeypatch.chdir(mine)
    asked = {"recipe": "my.py", "words": [], "folder": str(mine), "told": told}
    ray_train.work(asked)
    assert f"blue 1.0 {mine}" in capsys.readouterr().out
    with pytest.raises(Waiting):
        ray_train.work({**asked, "words": ["wrong=true"]})
    with pytest.raises(Waiting):
        ray_train.work({**asked, "folder": str(mine / "elsewhere")})
    (first, second) = told.said
    assert first == ("wrong: found out late", 2)
    assert "has no folder" in second[0]
    assert "that all machines share" in second[0]


@needs_ray
def test_a_worker_that_dies_is_started_again_with_the_others(mine, monkeypatch):
    """The one run on a real cluster: two workers, in their own process group, of whom one is killed."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    if (os.cpu_count() or 1) < 2:
        pytest.skip("a worker takes a CPU, and there is one")
    done = mdm("run", "--ray", "2", "--max-restarts", "1", "my.py", "die=true", cwd=mine, typecheck="0")
    assert f"blue 3.0 {mine} ['0', '2', '0']" in done.stdout + done.stderr
    assert "mdm: worker 1 has failed" in done.stdout + done.stderr
    assert (Path(mine) / "out" / "died").exists()
