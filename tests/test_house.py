"""The rules of the house: arrows point one way, components import alone, and what the README shows runs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"components": {"mdm", "recipes", "benchmarks", "tests"}, "mdm": {"recipes", "benchmarks", "tests"}}
HEAVY = {"torchtune", "torchdata", "tiktoken", "tokenizers", "datasets", "sklearn", "pycodec2", "matplotlib", "transformers"}
MAY_IMPORT = {
    "components.blocks": {"torchtune"},
    **{f"components.data.{name}": {"torchdata"} for name in ("draws.endless", "draws.workers", "nodes", "packing")},
    "components.tokenizers.text": {"tiktoken"},
}


WINGS = [
    "config",
    "hardware",
    "data",
    "models",
    "training",
    "generation",
    "pages",
    "evaluation",
    "studies",
    "hub",
    "recipe",
    "launch",
    "cli",
]
"""The rooms of mdm/, from the ground up: an arrow goes down, or stays inside."""


def named_modules(file: Path) -> set[str]:
    """Every module that a file imports; relative imports, names that `mdm` hands on, and names in strings, are resolved."""
    package = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else [node.module]
            home = ".".join(base)
            found |= {_home(a.name) if home == "mdm" else home for a in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mdm":
            found.add(_home(node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def _home(name: str) -> str:
    """Where `mdm.name` leads."""
    return sys.modules["mdm"]._HOMES.get(name, f"mdm.{name}")


def wing(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "mdm" and len(parts) > 1 else None


def upward(root: Path) -> list[str]:
    """The arrows of mdm/ that go up."""
    wrong = []
    for file in sorted((root / "mdm").rglob("*.py")):
        own = wing(".".join(file.relative_to(root).with_suffix("").parts))
        if own == "__init__" or "_recipes" in file.parts or "_benchmarks" in file.parts:
            continue
        for other in filter(None, map(wing, named_modules(file))):
            assert other in WINGS, f"{file} imports mdm.{other}, which is no room"
            if WINGS.index(other) > WINGS.index(own):
                wrong.append(f"{file.relative_to(root)} imports mdm.{other}")
    return wrong


def test_inside_mdm_arrows_go_down():
    assert not upward(ROOT)


@pytest.mark.parametrize(
    "line",
    [
        "from mdm import load_model",
        "from .. import load_model",
        "from ..models import folder",
        "from mdm.models.folder import load_model",
        "import mdm.cli",
        "import mdm; mdm.load_model",
        "importlib.import_module('mdm.models.folder')",
        "if TYPE_CHECKING: from mdm.models import folder",
    ],
)
def test_an_arrow_that_goes_up_is_seen_however_it_is_written(tmp_path, monkeypatch, line):
    (tmp_path / "mdm" / "data").mkdir(parents=True)
    (tmp_path / "mdm" / "data" / "rows.py").write_text(f"def late():\n    {line}\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(upward(tmp_path)) == 1


def test_rooms_have_few_files_and_files_one_idea():
    here = [f for f in (ROOT / "mdm").iterdir() if f.is_file()]
    assert len(here) <= 6, here
    for room in {f.parent for f in (ROOT / "mdm").rglob("*.py")} | {f.parent for f in (ROOT / "components").rglob("*.py")}:
        files = [f for f in room.iterdir() if f.is_file() and f.name not in ("__init__.py", "py.typed")]
        assert room.name == "components" or len(files) <= 14, f"{room}: {len(files)} files"
    long = [f for top in ("components", "mdm") for f in (ROOT / top).rglob("*.py") if len(f.read_text().splitlines()) > 320]
    assert not long


def test_import_mdm_is_quick_and_takes_no_torch_and_names_what_people_import():
    """Nor do components cost much more than torch, and none is checked on hot paths by default."""
    code = (
        "import os; os.environ.pop('MDM_TYPECHECK', None)\nimport sys, time; began = time.perf_counter(); import mdm\n"
        "assert 'torch' not in sys.modules and time.perf_counter() - began < 0.3\n"
        "import torch; began = time.perf_counter(); import components.samplers, components.schedules, components.losses\n"
        "assert time.perf_counter() - began < 2 and 'beartype' not in sys.modules\n"
        "assert set(mdm.__all__) <= set(dir(mdm)) and all(getattr(mdm, name) is not None for name in mdm.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def modules() -> list[str]:
    files = sorted((ROOT / "components").rglob("*.py"))
    return [str(f.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__") for f in files]


def test_arrows_point_from_recipes_to_mdm_to_components():
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for room, banned in FORBIDDEN.items()
        for file in (ROOT / room).rglob("*.py")
        for name in named_modules(file)
        if name.split(".")[0] in banned
    ]
    assert not wrong


def test_each_component_imports_alone_without_the_heavy_dependencies_of_the_others():
    """One interpreter, modules unloaded between imports: what a component pulls in is what it says it needs."""
    code = f"""
import importlib, sys
import torch, numpy, PIL.Image
heavy = {HEAVY!r}
for name in {modules()!r}:
    for loaded in [m for m in sys.modules if m.split('.')[0] in heavy | {{'components'}}]:
        del sys.modules[loaded]
    importlib.import_module(name)
    print(name, *sorted({{m.split('.')[0] for m in sys.modules}} & heavy))
"""
    light = [m for m in modules() if m not in MAY_IMPORT]
    code = code.replace(repr(modules()), repr(light))
    env = {**os.environ, "MDM_TYPECHECK": "0"}  # as a user imports them; and checks would be written anew at every import
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env).stdout
    rows = [line.split() for line in out.splitlines()]
    assert len(rows) == len(light)
    assert not [row for row in rows if len(row) > 1]


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.name)
def test_recipes_are_short_enough_to_follow(recipe):
    assert len(recipe.read_text().splitlines()) <= 320


def test_the_readmes_component_example_runs():
    readme = (ROOT / "README.md").read_text()
    example = readme.split("<!-- example -->")[1].split("```python\n")[1].split("```")[0]
    assert len(example.strip().splitlines()) <= 14
    exec(example, {})
