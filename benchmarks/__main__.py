"""Measure a part of the library. Every figure is a ratio of variants that took turns inside one run.

mdm bench train                                      masked positions only, bf16, compile, float8
mdm bench compile                                    what the compiler gains, and how long it takes
mdm bench quantize [--checkpoint runs/quickstart]    int8, int4, float8: speed, memory and quality
mdm bench sample                                     caches, compile, adaptive samplers
mdm bench sample --preset blocks [--checkouts FOLDER]  512 tokens: the exact cache of blocks beside others, and peers' decoders
mdm bench data [--ranks 1,8,64,512]                  rows a second against what training consumes; what a rank of many pays
mdm bench checkpoints                                how long a checkpoint stops the steps
mdm bench tokenizers                                 encoding and decoding
mdm bench restarts [--launcher ray] [--kills 20]     kill -9 at random moments: what it costs, and that nothing else is lost
mdm bench peers --checkouts FOLDER                   the code of others, from your own checkouts

In a checkout, python -m benchmarks is the same.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from components.progress import working
from mdm.config import UserError
from mdm.config.names import close
from mdm.recipe import Parser, exit_on_user_error

SUITES = ("train", "compile", "quantize", "sample", "data", "checkpoints", "restarts", "tokenizers", "peers")


def main(words: Sequence[str], prog: str) -> None:
    """Raises UserError."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("suite", metavar="SUITE", help=f"what to measure: {', '.join(SUITES)}")
    parser.add_argument(
        "--preset",
        default="cpu",
        help="smoke (tiny models: little is measured, and compiling still takes minutes), cpu (two cores: the default) or gpu",
    )
    parser.add_argument("--output", metavar="FILE.json", help="write it there, and FILE.png beside it")
    parser.add_argument("--checkpoint", metavar="DIR", help="quantize: a trained quickstart, whose quality is measured too")
    parser.add_argument(
        "--checkouts", metavar="FOLDER", help="peers, sample: a folder with checkouts, as benchmarks/peers names them"
    )
    parser.add_argument("--ranks", metavar="1,8,64,512", help="data: what one rank of so many pays for its own rows")
    parser.add_argument("--launcher", metavar="NAME", help="restarts: torchrun (the default) or ray")
    parser.add_argument("--kills", metavar="N", help="restarts: so many runs lose a process; 3 if absent")
    parser.add_argument("--seed", metavar="N", help="restarts: of the moments; 0 if absent")
    arguments = parser.read(words)
    if arguments.suite not in SUITES:
        raise UserError(f"suite {arguments.suite!r} is not one of {', '.join(SUITES)}{close(arguments.suite, SUITES)}")
    suite = importlib.import_module(f".{arguments.suite}", __package__)
    if arguments.preset not in suite.PRESETS:
        hint = close(arguments.preset, suite.PRESETS)
        raise UserError(f"--preset {arguments.preset}: choose from {', '.join(suite.PRESETS)}{hint}")
    if arguments.output is not None and Path(arguments.output).suffix != ".json":
        raise UserError(f"--output {arguments.output}: name a .json file")
    own = inspect.signature(suite.run).parameters
    given = {
        key: value
        for key, value in vars(arguments).items()
        if key in ("checkpoint", "checkouts", "ranks", "launcher", "kills", "seed") and value is not None
    }
    for key in given:
        if key not in own:
            raise UserError(f"--{key}: {arguments.suite} does not take one")
    print(
        f"{arguments.suite}, preset {arguments.preset}: variants that are compiled take up to a minute each first", flush=True
    )
    with working("building the variants"):
        result = suite.run(arguments.preset, **given)
    print(importlib.import_module(".measure", __package__).table(result))
    if arguments.output:
        result.write(Path(arguments.output))
        print(f"Written to {arguments.output}")


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:], "python -m benchmarks"))
