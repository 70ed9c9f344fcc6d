"""python -m benchmarks SUITE [--preset smoke|cpu|gpu] [--output FILE.json]"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

SUITES = ("train",)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=SUITES, help="what to measure")
    parser.add_argument("--preset", default="cpu", help="size of the measurement: smoke, cpu or gpu")
    parser.add_argument("--output", default=None, help="write the figures as JSON, e.g. benchmarks/results/train_cpu.json")
    arguments = parser.parse_args()
    suite = importlib.import_module(f"benchmarks.{arguments.suite}")
    if arguments.preset not in suite.PRESETS:
        parser.error(f"--preset {arguments.preset}: choose from {', '.join(suite.PRESETS)}")
    result = suite.run(arguments.preset)
    print(f"{'variant':<34}{'tokens/s':>12}{'ratio':>9}{'spread':>9}")
    for name, timing in result["seconds"].items():
        spread = (timing["slowest"] - timing["fastest"]) / timing["median"]
        ratio = result["speedup_over_all_logits_float32"][name]
        print(f"{name:<34}{result['tokens_per_second'][name]:>12,.0f}{ratio:>8.2f}x{spread:>8.0%}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1))
        print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
