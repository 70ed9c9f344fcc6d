"""The rules of the house: arrows point one way, components import alone, and what the README shows runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"components": {"mdm", "recipes", "benchmarks", "tests"}, "mdm": {"recipes", "benchmarks", "tests"}}
HEAVY = {"torchtune", "torchdata", "tiktoken", "tokenizers", "datasets", "sklearn", "pycodec2", "matplotlib", "transformers"}
MAY_IMPORT = {
    "components.blocks": {"torchtune"},
    **{f"components.data.{name}": {"torchdata"} for name in ("node", "endless", "nodes")},
    "components.tokenizers.text": {"tiktoken"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


def modules() -> list[str]:
    files = sorted((ROOT / "components").rglob("*.py"))
    return [str(f.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__") for f in files]


def test_arrows_point_from_recipes_to_mdm_to_components():
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for room, banned in FORBIDDEN.items()
        for file in (ROOT / room).rglob("*.py")
        for name in imports(file)
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
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
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
    subprocess.run([sys.executable, "-c", example], check=True, cwd=ROOT, capture_output=True)


def test_no_component_is_checked_on_hot_paths_by_default():
    code = (
        "import os; os.environ.pop('MDM_TYPECHECK', None)\nimport sys, components.losses\nassert 'beartype' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
