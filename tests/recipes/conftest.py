"""A pretraining small enough for a test: one layer, tiny canvases, in-memory data."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

CONFIG = """
output_dir: {output_dir}
model: {{_component_: mdm.models.builders.nano, max_length: 64, width: 32, num_layers: 2, num_heads: 2}}
tokenizers:
  text: {{_component_: components.tokenizers.text.TextTokenizer.train, vocab_size: 300}}
  image: {{_component_: components.tokenizers.image.GreyPatchTokenizer, size: 8, patch: 2, levels: 3}}
canvas: {{text: 12, image: 16}}
data:
  digits:
    train: {{_component_: components.data.digits.digits, split: test}}
    validation: {{_component_: components.data.digits.digits, split: judge}}
    weight: 2
    tasks: {{text_to_image: 1.0, image_to_text: 1.0}}
  text:
    train: {{_component_: components.data.reference.language_reference, split: test}}
    weight: 1
    tasks: {{text: 1.0}}
    pack: 32
masker: {{_component_: components.maskers.BernoulliMasker, pairs: true}}
batch: {{logical: 12, micro: 6}}
optimizer: {{lr: 1.0e-3}}
tokens: 12000
device: cpu
precision: fp32
compile: "false"
log_every_steps: 1
validation_samples: 16
validate_every_tokens: 100000
checkpoint_every_tokens: 100000
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(output_dir=tmp_path / "out"))
    return path


def mdm(*arguments, cwd=ROOT, check=True, timeout=240, typecheck="1", **options):
    """The `mdm` command as a user would run it.

    In this process, which has imported everything already; in one of its own where that is what is tested: several processes,
    no type checks, or `options` of subprocess.run. Returns what subprocess.run does.
    """
    words = [str(a) for a in arguments]
    if options or typecheck == "0" or (words[:1] == ["run"] and words[1].startswith("--") and words[1] != "--help"):
        env = {**os.environ, "MDM_TYPECHECK": typecheck, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-P", "-m", "mdm.cli", *words]  # as the installed command, it does not import from `cwd`
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout, **options)
    else:
        done = _here(words, Path(cwd))
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def unchecked(*commands, timeout=400):
    """What commands of `mdm` print, one after the other in one process without type checks: what one has read, the next has."""
    code = "import json, sys, pathlib, tests.recipes.conftest as here\n"
    code += "for words in json.loads(sys.argv[1]):\n"
    code += "    done = here._here(words, pathlib.Path.cwd())\n"
    code += "    print(json.dumps([done.returncode, done.stdout, done.stderr]), flush=True)"
    env = {**os.environ, "MDM_TYPECHECK": "0", "OMP_NUM_THREADS": "1"}
    words = json.dumps([[str(a) for a in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", code, words], capture_output=True, text=True, cwd=ROOT, env=env, timeout=timeout
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for code, *_ in found] == [0] * len(commands), (found[-1][2] if found else done.stderr)[-3000:]
    return [out for _, out, _ in found]


def _here(words, cwd):
    """The command in this process; what it changes of the process is put back."""
    from mdm import cli, recipe

    def leave(code):
        raise SystemExit(code)

    out, err, code = io.StringIO(), io.StringIO(), 0
    before, known = (Path.cwd(), sys.argv, list(sys.path), recipe.leave), set(sys.modules)
    os.chdir(cwd)
    sys.argv, recipe.leave = ["mdm", *words], leave
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as exit_:
        code = exit_.code or 0
    finally:
        os.chdir(before[0])
        sys.argv, sys.path[:], recipe.leave = before[1:]
        for name in set(sys.modules) - known:  # a user's own files
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(cwd)) and cwd != ROOT:
                del sys.modules[name]
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@pytest.fixture
def runs_in_process(monkeypatch):
    """The runs of a sweep or study one after the other in this process, in place of a process each; use workers=1."""
    from mdm.studies import runs

    class Here:
        STDOUT = subprocess.STDOUT

        @staticmethod
        def run(command, env, stdout, stderr, pass_fds):
            done = _here(command[4:], Path.cwd())
            stdout.write(done.stdout + done.stderr)
            return done

    monkeypatch.setattr(runs, "subprocess", Here)


def in_process(recipe, config, *overrides):
    """A recipe in this process, as the command would run it: for mistakes, which are found early."""
    from mdm.config import load
    from mdm.recipe import load_recipe

    module = load_recipe(recipe)
    cfg = load(module.Settings, config, [str(o) for o in overrides])
    module.validate(cfg)
    module.main(cfg)


@pytest.fixture
def run():
    return mdm


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A tri-modal model as a recipe exports it, with random weights: enough for every path that generates."""
    import torch

    from components.tokenizers.audio import Codec2Tokenizer
    from components.tokenizers.image import GreyPatchTokenizer
    from components.tokenizers.text import TextTokenizer
    from mdm.data.processor import Processor
    from mdm.hardware import Hardware
    from mdm.models import builders
    from mdm.models.folder import export

    folder = tmp_path_factory.mktemp("untrained")
    text = TextTokenizer.train(["a handwritten seven", "a spoken nine", "The value of the statement is"] * 20, vocab_size=300)
    tokenizers = {"text": text, "image": GreyPatchTokenizer(8, 2, 3), "audio": Codec2Tokenizer()}
    processor = Processor.build(tokenizers, {"text": 24, "image": 16, "audio": 16})
    model = builders.nano(vocab_size=processor.vocabulary.size, max_length=128, width=32, num_layers=1, num_heads=2)
    model.init_weights(torch.Generator().manual_seed(0))
    export(folder / "model", model, processor, Hardware(torch.device("cpu"), 0, 1, False))
    return folder
