"""What a run costs besides arithmetic, by hand; and the paper's own run, whose config is what its plan advises."""

import json
import math
import re

import pytest
import yaml

from mdm.config.files import recipe_root
from mdm.training.costs import Machine, Mesh, best_mesh, checkpoint, data, losses, traffic, young_daly
from tests.recipes.conftest import ROOT, mdm
from tests.recipes.test_bad_input import one_line

CONFIG = recipe_root() / "configs" / "pretrain_3b.yaml"


def moved(mesh, micros=1, **more):
    """Of 800 parameters in 2 blocks and 200 others, on machines of 8 cards."""
    found = traffic(800, 200, 2, mesh, 8, micros, **more)
    return found.inside, found.between


def test_sixteen_cards_of_two_machines_in_one_group():
    """Gathered in bf16: blocks twice, the rest once, 3,600 bytes; reduced in float32: 4,000. A ring brings 7/8 of it over
    NVLink, and half of it between the machines, by eight cards."""
    assert moved(Mesh(shard=16)) == pytest.approx((7600 * 7 / 8, 7600 / 2 / 8))
    assert moved(Mesh(shard=16), micros=3) == pytest.approx(((3 * 3600 + 4000) * 7 / 8, (3 * 3600 + 4000) / 2 / 8))
    assert moved(Mesh(shard=16), gather=4) == pytest.approx(((7200 + 4000) * 7 / 8, (7200 + 4000) / 2 / 8))


def test_a_group_in_each_of_two_machines_gathers_nothing_between_them():
    """Between them the sum of each card's eighth of the gradients, 500 bytes: reduced and gathered, half of it each time."""
    assert moved(Mesh(2, 8)) == pytest.approx((7600 * 7 / 8, 500))
    assert moved(Mesh(2, 8), micros=3) == pytest.approx(((3 * 3600 + 4000) * 7 / 8, 500))
    assert moved(Mesh(4, 4)) == pytest.approx((7600 * 3 / 4 + 2 * 1000 / 2, 2 * 1000 / 2 / 2))  # two replicas in each machine


def test_one_card_moves_nothing_and_tensor_parallelism_sums_activations():
    assert moved(Mesh()) == (0, 0)
    # four sums of 1,000 bytes in each of two blocks, each twice half of it
    assert moved(Mesh(tensor=2), activations=1000) == pytest.approx((4 * 2 * 2 * 1000 / 2, 0))


def test_time_is_of_bytes_and_of_the_hops_of_a_ring():
    machine = Machine(nvlink=1e-6, network=2e-6)  # 1,000 and 2,000 bytes a second
    inside, between = traffic(800, 200, 2, Mesh(shard=16), 8).seconds(machine)
    hops = (5 + 3) * (14 * 3.4e-6 + 2 * 14e-6)  # 2 * 2 + 1 gathers and 2 + 1 reductions; 14 hops inside, 2 between
    assert (inside, between) == pytest.approx((6.65, 475 / 2000 + hops), rel=1e-9)


def test_groups_in_machines_are_taken_where_they_move_less():
    """Blocks in one micro-batch: both move about the same bytes, in few hops or in many. Embeddings are gathered once."""
    meshes = [Mesh(shard=256), Mesh(32, 8)]
    assert best_mesh(meshes, 2.7e9, 0.8e9, 24, Machine(), 4, 2) == Mesh(32, 8)
    assert best_mesh(meshes, 2.7e9, 0.8e9, 24, Machine(), 1, 2) == Mesh(32, 8)
    assert best_mesh(meshes, 0.8e9, 2.7e12, 24, Machine(), 1, 2) == Mesh(shard=256)  # 2 + 4 bytes against 2 * 4


def test_tokens_are_drawn_once_for_a_pair():
    found = data(tokens=1e12, rate=1e6, ranks=16, machines=2, pairs=True)
    assert (found.process, found.machine) == (62_500, 500_000)
    assert (found.read, found.shards) == (1e6, 2e12)  # four bytes a token, for two rows
    assert data(1e12, 1e6, 16, 2, pairs=False).shards == 4e12


def test_a_checkpoint_is_weights_moments_and_the_average():
    machine = Machine(host=10, storage=2)
    saved = checkpoint(1e9, 8, True, split=8, machines=4, machine=machine)
    assert saved.bytes == 16e9
    assert (saved.pause, saved.write) == pytest.approx((16 / 8 / 10, 16 / 4 / 2))
    assert checkpoint(1e9, 8, False, 8, 4, machine).bytes == 12e9


def test_what_failures_cost():
    """A failure an hour, pauses of 2 s every 600 s, restarts of 10 minutes."""
    assert young_daly(2, 3600) == 120
    saved = checkpoint(1e9, 8, False, 1, 1, Machine(host=6, storage=1))
    assert (saved.pause, saved.write) == (2, 12)
    found = losses(30, 100, saved, 600, Machine(failures=0.01, restart=10))
    assert found.between == pytest.approx(3600)
    assert found.paused == pytest.approx(0.1)
    assert found.failures == pytest.approx(30.1)
    assert found.lost == pytest.approx(30.1 * 15 / 60)
    assert found.hours == pytest.approx(30.1 * 1.25)
    assert found.interval == pytest.approx(120)
    slow = checkpoint(1e9, 8, False, 1, 1, Machine(host=6, storage=0.05))
    assert losses(30, 100, slow, 600, Machine(failures=0.01)).interval == 240  # none begins before the last is written
    never = losses(30, 100, saved, 600, Machine(failures=0))
    assert (never.between, never.failures, never.lost) == (math.inf, 0, 0)


def test_defaults_are_what_their_sources_say():
    """Llama 3 (2407.21783): 419 interruptions in 54 days of 16,384 cards; one rank of 512 on token shards, measured here."""
    assert Machine().failures == pytest.approx(419 / (54 * 24 * 16_384), rel=0.01)
    measured = json.loads((ROOT / "benchmarks/results/ranks_cpu.json").read_text())["per_rank_rate"]["token shards"]["512"]
    assert Machine().loader == pytest.approx(measured, rel=0.2)
    written = yaml.safe_load((recipe_root() / "configs" / "plan.yaml").read_text())["machine"]
    assert {key: float(value) for key, value in written.items()} == vars(Machine())


@pytest.mark.parametrize(
    "wrong", ["cards=0", "nvlink=0", "network=-1", "storage=0", "host=0", "loader=0", "restart=-1", "failures=-1"]
)
def test_a_machine_that_is_none_is_one_line(wrong):
    line = one_line(mdm("plan", f"machine.{wrong}", check=False))
    assert line.startswith(f"mdm: machine.{wrong.partition('=')[0]} must be ")


@pytest.fixture(scope="module")
def planned():
    return mdm("plan", "--config", "pretrain_3b", "--gpu", "h100:256").stdout


def test_the_papers_run_is_set_as_its_plan_advises(planned):
    """Micro-batch, recomputation, physical batch, mesh, warm-up and checkpoints: the config's own are those printed."""
    cfg = yaml.safe_load(CONFIG.read_text())
    assert f"batch.micro={cfg['batch']['micro']} activation_checkpointing=null, " in planned
    assert cfg["activation_checkpointing"] is None
    assert cfg["batch"]["physical"] == cfg["batch"]["micro"] * 256
    assert f"{cfg['batch']['micro']} x 1 x 256 fill the cards" in planned
    assert "mesh: {replicate: null, shard: 8, tensor: 1, gather: auto}" in CONFIG.read_text()  # for any number of machines
    assert "mesh: {replicate: 32, shard: 8, tensor: 1}" in planned
    assert "mesh is advised" not in planned
    best = float(re.search(r"checkpoint_every_tokens = ([\d.]+) B", planned)[1])
    assert cfg["checkpoint_every_tokens"] / 1e9 == pytest.approx(best, rel=0.15)
    step = float(re.search(r"([\d.]+) M tokens in ", planned)[1]) * 1e6
    assert cfg["optimizer"]["warmup"] * cfg["tokens"] / step == pytest.approx(1000, rel=0.02)
    assert "Warning" not in planned


def test_a_plan_says_what_binds_and_what_was_assumed(planned):
    """12 bytes a parameter; four bytes a token of every other row. What binds is another thing where the machine is another."""
    parameters = float(planned.partition(" B parameters")[0])
    assert f"a checkpoint {12 * parameters:.1f} GB; two, and one that is being written, {36 * parameters:.0f} GB" in planned
    assert "token shards 12.8 TB" in planned
    assert "vocabulary of 124,917 (as published: text 100,277, image 16,384, audio 8,192)" in planned
    assert "What binds: compute. Behind it, as shares of compute: network between machines" in planned
    plan = ["plan", "--config", "pretrain_3b", "--gpu", "h100:256"]
    assert "What binds: network between machines (" in mdm(*plan, "machine.network=4").stdout
    assert "What binds: loader (" in mdm(*plan, "machine.loader=10_000").stdout
    assert "What binds: storage (" in mdm(*plan, "machine.storage=1e-5", "checkpoint_every_tokens=6_400_000_000_000").stdout
    assert "What binds: writing checkpoints (" in mdm(*plan, "checkpoint_every_tokens=1_000_000").stdout
    eight = mdm(*plan[:-1], "h100:8", "batch.physical=64", "optimizer.critical_steps=100_000_000").stdout
    assert "Warning: steps of 64 sequences leave" in eight
