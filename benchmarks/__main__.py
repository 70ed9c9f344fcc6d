"""Measure a part of the library. Every figure is a ratio of variants that took turns inside one run.

python -m benchmarks train                                      masked positions only, bf16, compile, float8
python -m benchmarks compile                                    what the compiler gains, and how long it takes
python -m benchmarks quantize [--checkpoint runs/quickstart]    int8, int4, float8: speed, memory and quality
python -m benchmarks sample                                     caches, compile, adaptive samplers
python -m benchmarks data                                       rows a second against what training consumes
python -m benchmarks tokenizers                                 encoding and decoding
python -m benchmarks peers --checkouts FOLDER                   the code of others, from your own checkouts
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from pathlib import Path

from benchmarks.measure import table

SUITES = ("train", "compile", "quantize", "sample", "data", "tokenizers", "peers")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES, help="what to measure")
    parser.add_argument("--preset", default="cpu", help="smoke (seconds), cpu (two cores, under five minutes) or gpu")
    parser.add_argument("--output", default=None, help="write FILE.json, and FILE.png beside it")
    parser.add_argument("--checkpoint", default=None, help="quantize: a trained quickstart, whose quality is measured too")
    parser.add_argument("--checkouts", default=None, help="peers: a folder with checkouts, as benchmarks/peers names them")
    arguments = parser.parse_args()
    suite = importlib.import_module(f"benchmarks.{arguments.suite}")
    if arguments.preset not in suite.PRESETS:
        parser.error(f"--preset {arguments.preset}: choose from {', '.join(suite.PRESETS)}")
    if arguments.output is not None and Path(arguments.output).suffix != ".json":
        parser.error(f"--output {arguments.output}: name a .json file")
    own = inspect.signature(suite.run).parameters
    given = {key: value for key, value in vars(arguments).items() if key in ("checkpoint", "checkouts") and value is not None}
    for key in given:
        if key not in own:
            parser.error(f"--{key}: {arguments.suite} does not take one")
    result = suite.run(arguments.preset, **given)
    print(table(result))
    if arguments.output:
        result.write(Path(arguments.output))
        print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
