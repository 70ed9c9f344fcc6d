"""Ratios, spreads and what stands beside them; the suites themselves run as benchmarks."""

import importlib
import json

import pytest

from benchmarks.__main__ import SUITES, main
from benchmarks.measure import Result, Timing, interleaved, rows, table
from mdm.config import UserError


def test_rates_are_work_over_the_median_and_ratios_against_the_first():
    timings = {"slow": Timing(2.0, 1.5, 2.5), "fast": Timing(0.5, 0.4, 0.6)}
    slow, fast = rows(timings, 100, {"fast": {"GiB": 3.0}})
    assert (slow.rate, slow.ratio, slow.timing.spread) == (50, 1, 0.5)
    assert (fast.rate, fast.ratio, fast.more) == (200, 4, {"GiB": 3.0})
    own = rows(timings, {"slow": 10.0, "fast": 20.0})
    assert [row.rate for row in own] == [5, 40]


def test_variants_take_turns_after_a_warm_up():
    calls = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warmup=2, repeats=3)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert all(t.fastest <= t.median <= t.slowest for t in timings.values())


def test_a_result_is_written_with_its_machine_and_a_plot(tmp_path):
    found = rows({"a": Timing(1, 1, 1), "b": Timing(2, 1, 3)}, 10) + rows({"c": Timing(1, 1, 1)}, 70, group="another task")
    result = Result("train", "smoke", "tokens/s", {"width": 8}, found, {"masked_only_speedup": 1.5}, ["float8: no GPU"])
    result.write(tmp_path / "x" / "train.json")
    written = json.loads((tmp_path / "x" / "train.json").read_text())
    assert written["masked_only_speedup"] == 1.5
    assert written["rows"][1]["timing"]["slowest"] == 3
    assert {"cpu", "gpu", "threads", "torch", "torchao"} <= set(written["machine"])
    assert (tmp_path / "x" / "train.png").stat().st_size > 5000
    shown = table(result)
    assert "0.50x" in shown
    assert shown.index("-- another task") < shown.index("\nc ")
    assert "not measured: float8: no GPU" in shown


def test_what_is_too_noisy_to_read_is_marked_with_what_is_compared_with_it(tmp_path):
    still, shaken = Timing(1.0, 0.9, 1.1), Timing(1.0, 0.5, 2.1)
    found = rows({"a": still, "b": shaken, "c": still}, 10, group="one") + rows({"d": shaken, "e": still}, 10, group="two")
    result = Result("train", "smoke", "tokens/s", {}, found)
    marked = {line.split()[0]: "~" in line for line in table(result).splitlines() if line[:1] in "abcde"}
    assert marked == {"a": False, "b": True, "c": False, "d": True, "e": True}
    assert "~ too noisy to read: its repeats" in table(result)
    assert "~" not in table(Result("train", "smoke", "tokens/s", {}, found[:1]))
    result.write(tmp_path / "noisy.json")
    assert json.loads((tmp_path / "noisy.json").read_text())["too_noisy"] == ["one: b", "two: d", "two: e"]


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_a_preset_for_two_cores_and_for_a_gpu(suite):
    assert {"smoke", "cpu", "gpu"} <= set(importlib.import_module(f"benchmarks.{suite}").PRESETS)


def test_mistakes_are_one_line():
    for words, message in {
        "train --preset tpu": "--preset tpu: choose from smoke, cpu, gpu",
        "data --checkpoint x": "--checkpoint: data does not take one",
        "data --output x.png": "--output x.png: name a .json file",
        "peers": "peers: --checkouts FOLDER",
        "trian": "suite 'trian' is not one of train, compile, .*did you mean 'train'",
    }.items():
        with pytest.raises(UserError, match=message):
            main(words.split(), "python -m benchmarks")
