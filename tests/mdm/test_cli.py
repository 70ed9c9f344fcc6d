"""The command explains itself, says a mistake in one line, and takes neither a user's modules for ours nor ours for theirs."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdm import cli
from mdm.config import UserError, find_config, layers, load, recipe_root
from mdm.config.recipes import about, find_recipe, recipe_names, recipe_of
from mdm.recipe import Parser, load_recipe
from tests.recipes.conftest import CONFIG, ROOT, _here, mdm
from tests.recipes.test_bad_input import one_line

COMMANDS = ("ls", "cp", "run", "generate", "chat", "demo", "plan", "study", "validate", "bench")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder of recipes and configs in place of the library's own: one config names a module beside it."""
    root = tmp_path / "library"
    (root / "configs").mkdir(parents=True)
    for place in ("config.files", "config.recipes", "cli", "recipe"):
        monkeypatch.setattr(f"mdm.{place}.recipe_root", lambda: root)
    (root / "show.py").write_text(
        '"""Show what was found."""\n'
        "from dataclasses import dataclass, field\n"
        "from typing import Any\n"
        "from mdm.config import instantiate\n"
        "from mdm.recipe import run_recipe\n"
        'CONFIG = "show"\n'
        "@dataclass\n"
        "class Settings:\n"
        "    found: Any = None\n"
        "    seed: int = 0\n"
        "def validate(cfg):\n"
        "    pass\n"
        "def main(cfg):\n"
        '    print("found", instantiate(cfg.found, "found"), cfg.seed)\n'
        'if __name__ == "__main__":\n'
        "    run_recipe(Settings, validate, main, CONFIG)\n"
    )
    (root / "configs" / "show.yaml").write_text("# Show.\nfound: {_component_: a_pen_of_mine.ink} # what is shown\nseed: 1\n")
    (root / "configs" / "more.yaml").write_text("base: show\nseed: 2 # another\n")
    (root / "configs" / "a_pen_of_mine.py").write_text("def ink():\n    return 'blue'\n")
    (tmp_path / "mine").mkdir()
    yield root
    for name in ("a_pen_of_mine", "mdm_recipe_show"):
        sys.modules.pop(name, None)


def test_every_command_is_listed_and_explained():
    page = mdm("--help").stdout
    for command in COMMANDS:
        assert f"\n    {command} " in page
    for command, takes in {
        "cp": ["RECIPE", "PATH", "--force"],
        "run": ["[TORCHRUN FLAGS] RECIPE [--config CONFIG] [key=value ...]", "--nproc_per_node 8", "--ray 16 pretrain"],
        "validate": ["RECIPE [--config CONFIG] [key=value ...] [--look FOLDER]"],
        "study": ["FOLDER"],
        "generate": ["--film", "--config", "edit: null # an image or a clip", "batch_size: 100"],
        "chat": ["Ctrl-C stops an answer", "template: null # what is made of a question"],
        "demo": ["port: 7860", "0.0.0.0 lets other machines in"],
        "plan": ["--gpu CARD:COUNT", "gpu: h100 # CARD", "which builds on", "tokens: 3_000_000 # the horizon"],
        "bench": ["SUITE", "--preset", "mdm bench peers --checkouts FOLDER"],
        "ls": ["usage: mdm ls"],
    }.items():
        shown = mdm(command, "--help").stdout
        for words in takes:
            assert words in " ".join(shown.split()), (command, shown)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipes_help_names_every_key(name):
    """Every setting stands in the recipe's own config, or in what that builds on: there it is explained."""
    shown = mdm("run", name, "--help").stdout
    config = about(find_recipe(name))[1]
    assert f"{config}.yaml" in shown
    keys = {key for file in layers(find_config(config)).values() for key in file}
    fields = {field.name for field in dataclasses.fields(load_recipe(name).Settings)}
    assert fields <= keys, fields - keys
    assert all(f"\n{key}:" in shown for key in keys)
    assert config == load_recipe(name).CONFIG


def test_a_recipes_help_is_that_of_the_config_that_is_named(tmp_path):
    text = CONFIG.format(output_dir=tmp_path / "out")
    (tmp_path / "mine.yaml").write_text(text)
    assert text.strip() in mdm("run", "pretrain", "--config", tmp_path / "mine.yaml", "--help").stdout
    assert "mdm validate pretrain" in mdm("validate", "pretrain", "--help").stdout
    mdm("cp", "pretrain", tmp_path / "my.py")
    assert f"usage: mdm run {tmp_path / 'my.py'}" in mdm("run", tmp_path / "my.py", "--help").stdout  # as it is called
    assert "usage: mdm run pretrain" in _here(["run", "--nproc_per_node", "2", "pretrain", "-h"], ROOT).stdout


def test_help_and_lists_take_no_torch():
    code = "import sys\nfrom mdm.cli import main\nimport mdm.recipe\n"
    code += "mdm.recipe.leave = lambda code: None\nsys.argv = ['mdm', *sys.argv[1:]]\nmain()\nassert 'torch' not in sys.modules"
    env = {**os.environ, "MDM_TYPECHECK": "0", "PYTHONPATH": str(ROOT)}
    for words in (["--help"], ["ls"], ["run", "pretrain", "--help"], ["bench", "--help"]):
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, env=env)


WRONG = {
    "a command": (["pretrian"], "command 'pretrian' is not one of ls, cp, run, "),
    "nearly a command": (["validat"], "(did you mean 'validate'?)"),
    "an option of all": (["--hlp"], "unknown argument '--hlp' (did you mean '--help'?); mdm --help lists"),
    "an option": (["cp", "pretrain", "my.py", "--forse"], "'--forse' (did you mean '--force'?); mdm cp --help lists"),
    "no path": (["cp", "pretrain"], "the following arguments are required: PATH; mdm cp --help lists what it takes"),
    "no path at all": (["cp", "pretrain", ""], "PATH '' is no file's name; write my.py, my.yaml or a folder"),
    "another kind of file": (
        ["cp", "pretrain", "my.txt"],
        "ends neither in .py nor in .yaml, and is no folder; write my.py",
    ),
    "nearly a recipe to copy": (["cp", "pretrian", "my.py"], "(did you mean 'pretrain'?)"),
    "nearly a config to copy": (["cp", "quickstart_pne", "my.yaml"], "(did you mean 'quickstart_pen'?)"),
    "nearly a recipe to check": (["validate", "pretrian"], "(did you mean 'pretrain'?)"),
    "nearly a config": (["run", "pretrain", "--config", "pretrain_hbu"], "(did you mean 'pretrain_hub'?)"),
    "nearly a config's file": (["run", "pretrain", "--config", "recipes/configs/plam.yaml"], "(did you mean 'plan.yaml'?)"),
    "nearly a recipe's file": (["run", "recipes/plam.py"], "recipe file not found: recipes/plam.py (did you mean 'plan.py'?)"),
    "a setting with dashes": (
        ["generate", "--checkpoint", "X", "task=text"],
        "dashes: write checkpoint=X); mdm generate",
    ),
    "a setting with dashes and =": (["run", "generate", "--batch-size=5"], "(settings have no dashes: write batch_size=5)"),
    "one in a torchrun's place": (["run", "--tokens", "5", "pretrain"], "dashes: write tokens=5, behind the recipe)"),
    "an option without dashes": (["bench", "train", "checkpoint=X"], "(did you mean '--checkpoint'?); mdm bench --help"),
    "a path without end": (["cp", "pretrain", "x" * 300], "x' is no file's name"),
    "two folders": (["study", "a", "b"], "unknown argument 'b'; mdm study --help lists what it takes"),
    "an option of a recipe": (
        ["run", "pretrain", "--confg", "x"],
        "'--confg' (did you mean '--config'?); mdm run pretrain",
    ),
    "an option of generate": (["generate", "--flim", "task=text"], "'--flim' (did you mean '--film'?); mdm generate --help"),
    "an option without its value": (["plan", "--gpu"], "argument --gpu: expected one argument; mdm plan --help"),
    "a recipe": (["run", "pretrian"], "(did you mean 'pretrain'?)"),
    "no recipe": (["run", "--nnodes=1"], "mdm run needs a recipe: one of "),
    "a flag of torchrun": (["run", "--nproc_per_nodes=2", "pretrain"], "(did you mean '--nproc_per_node'?); mdm run --help"),
    "a module": (["run", "--module", "torch"], "--module, --no_python and --run_path name none"),
    "no number of workers": (
        ["run", "--ray", "x", "pretrain"],
        "--ray x: write how many workers there are to be, as in --ray 16",
    ),
    "no workers": (["run", "--ray", "0", "pretrain"], "--ray 0: write how many workers"),
    "two launchers": (["run", "--ray", "2", "--nproc_per_node", "2", "pretrain"], "--ray 2: --nproc_per_node is torchrun's"),
    "Ray's nodes": (
        ["run", "--ray=2", "--nnodes=1:1", "pretrain"],
        "--ray 2: --nnodes is torchrun's; Ray takes --max-restarts",
    ),
    "a suite": (["bench", "trian"], "suite 'trian' is not one of train, compile, quantize"),
    "a preset": (["bench", "train", "--preset", "tpu"], "--preset tpu: choose from smoke, cpu, gpu"),
    "nearly a preset": (["bench", "train", "--preset", "smok"], "(did you mean 'smoke'?)"),
}


def test_every_recipe_is_listed_with_what_it_does_and_a_config():
    _, *lines = mdm("ls").stdout.splitlines()
    said = {line.split()[0]: line.split(None, 1)[1] for line in lines[::2]}
    assert list(said) == recipe_names()
    assert all(len(words) > 20 for words in said.values())
    assert all(config.strip() for config in lines[1::2])


@pytest.mark.parametrize("path", ["", ".", "./", "deep/new/", "there"])
def test_a_folder_takes_a_recipe_under_its_own_name(tmp_path, path):
    (tmp_path / "there").mkdir()
    if not path:
        path = str(tmp_path)
    said = mdm("cp", "pretrain", path, cwd=tmp_path).stdout
    copied = Path(path) / "pretrain.py"
    assert (tmp_path / copied).read_text() == find_recipe("pretrain").read_text()
    assert said.endswith(f"Run it with: mdm run {copied} --config {copied.with_suffix('.yaml')}\n")
    assert f"{copied} exists" in one_line(mdm("cp", "pretrain", path, cwd=tmp_path, check=False))


def test_a_folder_takes_a_config_under_its_own_name_with_its_module(tmp_path):
    done = mdm("cp", "quickstart_pen", ".", cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pen.py", "quickstart_pen.yaml"]
    assert done.stdout.endswith("Run it with: mdm run quickstart --config quickstart_pen.yaml\n")
    mdm("cp", "quickstart_any", "mine", cwd=tmp_path)
    assert (tmp_path / "mine.yaml").is_file()


def test_what_cannot_be_copied_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.yaml").write_text("mine")
    for path, why in {
        "taken.py": "taken.yaml exists; choose another path, or --force to replace it",
        "file/my.py": "file/my.py cannot be written (file is a file, no folder); choose another path",
    }.items():
        assert why in one_line(mdm("cp", "pretrain", path, cwd=tmp_path, check=False))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.yaml"]
    mdm("cp", "pretrain", "taken.py", "--force", cwd=tmp_path)
    assert (tmp_path / "taken.yaml").read_text() != "mine"


def test_a_folder_that_may_not_be_written_to_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("mdm.config.recipes.os.access", lambda path, mode: False)  # root may write anywhere
    assert "my.py cannot be written (Permission denied)" in one_line(mdm("cp", "pretrain", "my.py", cwd=tmp_path, check=False))


def test_a_config_in_a_recipes_place_is_told_its_command():
    done = mdm("run", "quickstart_any", check=False)
    assert done.returncode == 2
    assert done.stderr == "mdm: 'quickstart_any' is a config; run it with: mdm run quickstart --config quickstart_any\n"


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.replace(" ", "_"))
def test_a_wrong_word_is_one_line(case):
    words, message = WRONG[case]
    assert message in one_line(_here(words, ROOT))


def test_options_are_settings_wherever_they_stand(monkeypatch):
    started = []
    monkeypatch.setattr(cli, "_start", lambda recipe, words: started.append((recipe.stem, words)))
    mdm("generate", "checkpoint=x", "--film", "task=text", "prompt=a --film")
    mdm("plan", "--gpu", "h100:8", "--config", "pretrain_hub", "vocab=9")
    assert started == [
        ("generate", ["--config", "generate", "checkpoint=x", "task=text", "prompt=a --film", "film=true"]),
        ("plan", ["--config", "pretrain_hub", "vocab=9", "gpu=h100:8"]),
    ]


LAUNCHED = {
    "--nproc_per_node 2 pretrain": (True, "2"),
    "--standalone pretrain --config pretrain": (True, "1"),
    "--nproc-per-node=2 --tee 3 pretrain": (True, "2"),
    "--nproc_per_node 2 --nnodes 2 --rdzv_endpoint host:1 pretrain": (False, "2"),
}


@pytest.mark.parametrize("line", LAUNCHED)
def test_torchruns_own_parser_tells_its_flags_from_the_recipe(monkeypatch, line):
    """A flag may take a value or none; only where nothing says how processes meet do they meet on this machine."""
    from torch.distributed import run as torchrun

    seen = []
    monkeypatch.setattr(torchrun, "run", seen.append)
    monkeypatch.setattr(cli, "prepare", lambda recipe, words: None)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # which the launcher would set for this process
    mdm_run = ["run", *line.split(), "a=1"]
    before = list(sys.path)
    try:
        cli.parser()[1]["run"].get_default("work")(cli.parser()[1]["run"], mdm_run[1:])
    finally:
        sys.path[:] = before
    (launched,) = seen
    assert (launched.standalone, launched.nproc_per_node) == LAUNCHED[line]
    after = line.split()[line.split().index("pretrain") + 1 :]
    command = [launched.training_script, *launched.training_script_args]
    assert command == [sys.executable, "-u", "-P", "-m", "mdm.cli", "run", str(recipe_root() / "pretrain.py"), *after, "a=1"]


def test_a_module_beside_a_config_is_importable_when_that_config_runs(library, tmp_path):
    for config in ("show", "more", library / "configs" / "show.yaml"):
        assert "found blue" in mdm("run", "show", "--config", config, cwd=tmp_path / "mine").stdout


def test_what_is_installed_goes_before_a_module_beside_a_config(library):
    before = list(sys.path)
    try:
        load(load_recipe("show").Settings, find_config("more"))
        assert sys.path == [*before, str(library / "configs")]
    finally:
        sys.path[:] = before


def test_a_copied_config_takes_along_the_modules_that_it_names(library, tmp_path):
    mine = tmp_path / "mine"
    done = mdm("cp", "show", "first.yaml", cwd=mine)
    assert done.stdout == (
        "show.yaml -> first.yaml\na_pen_of_mine.py -> a_pen_of_mine.py\nRun it with: mdm run show --config first.yaml\n"
    )
    mdm("cp", "show", "second.yaml", cwd=mine)  # what has been copied is there
    (mine / "a_pen_of_mine.py").write_text("def ink():\n    return 'red'\n")
    assert "a_pen_of_mine.py exists" in one_line(mdm("cp", "show", "third.yaml", cwd=mine, check=False))
    assert not (mine / "third.yaml").exists()
    assert "found red 1" in mdm("run", "show", "--config", "first.yaml", cwd=mine).stdout
    (mine / "a_pen_of_mine.py").unlink()
    mdm("cp", "show", "deep/copy.py", cwd=mine)
    assert sorted(p.name for p in (mine / "deep").iterdir()) == ["a_pen_of_mine.py", "copy.py", "copy.yaml"]
    (mine / "deep" / "copy.yaml").write_text("found: {_component_: a_pen_of_mine.ink}\nseed: 7\n")
    assert "found blue 7" in mdm("run", "deep/copy.py", cwd=mine).stdout  # with the config beside it
    assert "keys of deep/copy.yaml" in mdm("run", "deep/copy.py", "--help", cwd=mine).stdout


def test_a_config_that_builds_on_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match=r"a.yaml builds on itself"):
        layers(tmp_path / "a.yaml")


def python(*words, cwd, **env):
    env = {**os.environ, "MDM_TYPECHECK": "0", "PYTHONPATH": "", **env}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture
def installed(tmp_path):
    """A folder, and a first line for its scripts: they find the library after what lies beside them, as an installed one."""
    (tmp_path / "user").mkdir()
    return tmp_path / "user", f"import sys; sys.path.insert(1, {str(ROOT)!r})\n"


def package(folder: Path, name: str, regular: bool = True) -> Path:
    (folder / name).mkdir()
    if regular:
        (folder / name / "__init__.py").touch()
    (folder / name / "mine.py").write_text("def ink():\n    return 'green'\n")
    return folder / name


def test_a_users_components_are_not_taken_for_ours(installed):
    folder, start = installed
    package(folder, "components")
    (folder / "my.py").write_text(start + "import components.mine\nprint(components.mine.ink())\nimport mdm\n")
    done = python("my.py", cwd=folder)
    assert done.stdout == "green\n"  # theirs alone is theirs
    assert f"{folder}/components/__init__.py was imported in place of this library's {ROOT}/components" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ImportError: ")


def test_ours_are_not_taken_for_a_users_without_a_word(installed):
    """A folder without an `__init__.py` comes after any package of its name."""
    folder, start = installed
    package(folder, "components", regular=False)
    (folder / "my.py").write_text(start + "import components.vocabulary\n")
    done = python("my.py", cwd=folder)
    assert done.returncode == 0
    line = f"{folder}/components has the name of this library's {ROOT}/components: `import components` is the library's"
    assert done.stderr == f"{line}; give yours another name\n"


def test_a_users_mdm_is_named_where_our_components_are_imported(installed):
    folder, start = installed
    package(folder, "mdm")
    (folder / "my.py").write_text(start + "import components.vocabulary\nimport mdm.mine\nprint(mdm.mine.ink())\n")
    done = python("my.py", cwd=folder)
    assert done.stdout == "green\n"
    assert done.stderr.startswith(f"{folder}/mdm has the name of this library's {ROOT}/mdm: `import mdm` is yours")


@pytest.mark.parametrize("regular", [True, False])
def test_the_command_imports_its_own_and_says_what_it_hides(library, tmp_path, regular):
    mine = tmp_path / "mine"
    for name in ("components", "mdm"):
        package(mine, name, regular)
    done = mdm("run", "show", "seed=3", cwd=mine)
    assert "found blue 3" in done.stdout
    assert [line.split(" has ")[0] for line in done.stderr.splitlines()] == [f"{mine}/components", f"{mine}/mdm"]
    done = mdm("run", "show", "found={_component_: components.mine.ink}", cwd=mine, check=False)
    assert done.returncode == 2
    assert f"{mine}/components is hidden by {ROOT}/components; give yours another name" in done.stderr.splitlines()[-1]


def test_a_users_benchmarks_and_recipes_are_theirs_or_named(library, tmp_path):
    mine = tmp_path / "mine"
    package(mine, "benchmarks", regular=False)
    line = one_line(mdm("run", "show", "found={_component_: benchmarks.mine.ink}", cwd=mine, check=False))
    assert f"{mine}/benchmarks is hidden by {ROOT}/benchmarks" in line
    package(mine, "recipes")
    assert "found green" in mdm("run", "show", "found={_component_: recipes.mine.ink}", cwd=mine).stdout


def test_a_process_of_its_own_imports_ours_as_ours_and_finds_what_is_beside_the_config(library, tmp_path):
    """As each process of torchrun is, and each run of a study; the user has a regular package `components`."""
    mine, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    mdm("cp", "show", "copy.py", cwd=mine)
    package(mine, "components")
    elsewhere.mkdir()
    for name in ("copy.yaml", "a_pen_of_mine.py"):
        (mine / name).rename(elsewhere / name)
    done = mdm("run", "copy.py", "--config", elsewhere / "copy.yaml", cwd=mine, typecheck="0")
    assert done.stdout == "found blue 1\n"
    assert done.stderr.count(f"{mine}/components has the name of this library's {ROOT}/components") == 1


def test_parsers_take_their_words_in_any_order():
    parser = Parser(prog="x")
    parser.add_argument("--one")
    parser.add_argument("words", nargs="*")
    assert parser.read(["a", "--one", "1", "b"]).words == ["a", "b"]


@pytest.mark.parametrize("base", ["7", "[a]", "{a: b}"])
def test_a_base_that_is_no_name_is_one_line(tmp_path, base):
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    with pytest.raises(UserError, match=r"a.yaml: base must be a config's name or path, got "):
        layers(tmp_path / "a.yaml")


def test_a_module_of_the_librarys_own_configs_is_found_by_those_that_name_it_alone(monkeypatch):
    """Else a stranger's checkpoint that names a `pen` would be given ours, whatever it was trained with."""

    configs = recipe_root() / "configs"
    here = [place for place in sys.path if Path(place) != configs]
    for name, found in (("generate", False), ("quickstart_any", False), ("quickstart_pen", True)):
        monkeypatch.setattr(sys, "path", [*here])
        with contextlib.suppress(UserError):  # the keys are those of no recipe
            load(dataclasses.make_dataclass("Nothing", []), configs / f"{name}.yaml")
        assert (str(configs) in sys.path) == found, name


def test_every_config_says_which_recipe_it_is_for():
    configs = sorted((recipe_root() / "configs").glob("*.yaml"))
    assert not [c.stem for c in configs if recipe_of(c) not in recipe_names()]
