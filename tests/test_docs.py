"""What the documentation shows holds: snippets print what they say, commands parse, links lead somewhere, all is there."""

import ast
import dataclasses
import importlib
import itertools
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from mdm import cli
from mdm.config import check, find_config, load, recipe_root
from mdm.config.protocols import members
from mdm.config.recipes import config_of, find_recipe, recipe_of
from mdm.data.settings import MASKER_SUPPLIED
from mdm.recipe import load_module, load_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "benchmarks/README.md", *DOCS.rglob("*.md")]
PLACEHOLDER = re.compile(r"^[A-Z_]{2,}$|^\.\.\.$")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[int, str, str]]:
    """The fenced blocks of a page: the line each opens at, its title, its text."""
    found = re.finditer(rf"^```{language}(?: title=\"([^\"]+)\")?\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [(page.read_text()[: m.start()].count("\n") + 1, m[1] or "", m[2]) for m in found]


def all_blocks(language: str) -> list:
    return [pytest.param(page, *b, id=f"{name(page)}:{b[0]}") for page in sorted(PAGES) for b in blocks(page, language)]


def expected(code: str) -> list[str]:
    """What a block says that its prints print: the comment behind each, or the comment lines below it."""
    lines, said = code.splitlines(), []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            end = node.end_lineno or node.lineno
            behind = lines[end - 1].partition("  # ")[2]
            below = itertools.takewhile(lambda line: line.startswith("# "), lines[end:])
            said.append(behind or "\n".join(line[2:] for line in below))
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary):
    """Where a reader of the docs stands: with a trained model, an image, a clip, some text, and the files that pages show."""
    import torch
    from PIL import Image

    from components.tokenizers.clips import write_wav
    from components.tokenizers.image import GreyPatchTokenizer
    from components.tokenizers.text import TextTokenizer
    from mdm.data.processor import Processor
    from mdm.hardware import hardware
    from mdm.models.builders import pico
    from mdm.models.folder import export

    place = tmp_path_factory.mktemp("reader")
    words = TextTokenizer.train(["a handwritten seven", "a handwritten nine"] * 20, 280)
    processor = Processor.build({"text": words, "image": GreyPatchTokenizer(8, 2, 3)}, {"text": 20, "image": 16})
    torch.manual_seed(0)
    with hardware("cpu", "fp32") as hw:
        export(place / "model", pico(processor.vocabulary.size, 128), processor, hw)
    Image.new("L", (8, 8), 200).save(place / "seven.png")
    write_wav(place / "seven.wav", torch.linspace(-0.5, 0.5, 8000).numpy(), 8000)
    for page in PAGES:
        for _, title, code in [*blocks(page, "python"), *blocks(page, "yaml")]:
            if title:
                (place / title).write_text(code)
    shutil.copy(recipe_root() / "configs/pen.py", place)
    before = Path.cwd()
    sys.path.insert(0, str(place))
    os.chdir(place)
    yield place
    os.chdir(before)
    sys.path.remove(str(place))


@pytest.mark.parametrize(("page", "line", "title", "code"), all_blocks("python"))
def test_a_snippet_prints_what_it_says(folder, page, line, title, code):
    said = expected(code)
    printed: list[str] = []

    def record(*values: object) -> None:
        printed.append(" ".join(map(str, values)))

    code = code.replace("builtin:quickstart", str(folder / "model"))
    exec(compile(code, f"{page}:{line}", "exec"), {"__name__": "snippet", "print": record})
    assert title or printed == said  # a block with a title is a file, which others use


@pytest.mark.parametrize(("page", "line", "title", "text"), all_blocks("yaml"))
def test_a_configs_keys_exist(folder, page, line, title, text):
    """A config that is shown is whole with its `base`, or a part of what its page copies, or else of `pretrain`."""
    if title:
        return  # of a recipe that the page shows: its command reads it
    base = re.search(r"^base: (\w+)", text, re.M)
    config = folder / "shown.yaml"
    copied = re.search(r"^mdm cp (\w+) my\.yaml", page.read_text(), re.M)
    below = base[1] if base else copied[1] if copied else "pretrain"
    config.write_text(text if base else f"base: {below}\n{text}")
    filled = load(load_recipe(recipe_of(find_config(below))).Settings, config)
    for key, node in components(dataclasses.asdict(filled)):
        check(node, key, Anything())


@pytest.mark.parametrize("page", sorted(DOCS.glob("reference/*/*.md")), ids=name)
def test_a_components_page_opens_with_a_short_snippet(page):
    if page.parent.name == "mdm" or page.stem == "index":
        return
    before, _, _ = page.read_text().partition("\n::: ")
    (_, _, code), *_ = blocks(page, "python")
    assert code in before
    assert len(code.strip().splitlines()) <= 10
    assert expected(code), "its shapes are not printed"


def modules() -> list[str]:
    files = [f for top in ("components", "mdm") for f in sorted((ROOT / top).rglob("*.py")) if "_recipes" not in f.parts]
    dotted = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files]
    return [module for module in dotted if not any(part.startswith("_") for part in module.split("."))]


def test_the_reference_has_every_module_once():
    shown = [m for page in DOCS.rglob("*.md") for m in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
    rooms = {f"{top}" for top in ("components", "mdm")} | {m for m in modules() if (ROOT / m.replace(".", "/")).is_dir()}
    assert sorted(shown) == sorted(set(shown))
    assert set(modules()) - rooms <= set(shown)
    assert set(shown) <= set(modules())


def test_the_navigation_has_every_page_once():
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    adopted = set(load_module("site_pages", DOCS / "tools/pages.py").ADOPTED.values())
    assert sorted(listed) == sorted({str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} | adopted)


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """The words of every `mdm` command that a page's shell blocks show, and the line it stands in."""
    found = []
    for start, _, text in blocks(page, "bash"):
        joined = text.replace("\\\n", "  ")
        for number, line in enumerate(joined.splitlines(), start + 1):
            for part in re.split(r"&&|;", line):
                words = shlex.split(part, comments=True)
                words = words[1:] if words[:1] and words[0].endswith("python") else words
                words = words[2:] if words[:2] == ["-m", "mdm.cli"] else words
                if words and Path(words[0]).name == "mdm":
                    found.append((number, words[1:]))
    return found


TORCHRUN = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max-restarts", "--ray"}


def recipe_and_config(words: list[str], copied: dict[str, str]) -> tuple[str, str | None, list[str]]:
    """Of the words behind `mdm run`: recipe, config, and key=value arguments; copies are what they were copied from."""
    words = list(words)
    while words[0] in TORCHRUN:
        words = words[2:]
    recipe, config, rest = copied.get(words[0], words[0]), None, []
    words = words[1:]
    while words:
        word = words.pop(0)
        if word == "--config":
            config = words.pop(0)
        elif word.startswith("--"):
            assert word in ("--help", "--film", "--gpu", "--look"), word
            words = words[1:] if word in ("--gpu", "--look") else words
        else:
            rest.append(word)
    return recipe, config, rest


def components(node, key=""):
    """Every `_component_` node of settings, with its key."""
    if isinstance(node, dict):
        if "_component_" in node:
            yield key, node
        for name, value in node.items():
            yield from components(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from components(value, f"{key}[{i}]")


class Anything(list):
    """Stands for the arguments that a recipe supplies."""

    def __contains__(self, name):
        return True


@pytest.mark.parametrize("page", sorted(p for p in PAGES if commands(p)), ids=name)
def test_a_command_parses_and_its_keys_exist(folder, page):
    """As `mdm validate`, without building anything: recipe and config are found, keys are known, components importable."""
    copied: dict[str, str] = {}
    _, choices = cli.parser()
    for line, words in commands(page):
        try:
            command, rest = words[0], words[1:]
            if command in ("--help", "--version"):
                continue
            assert command in choices, f"{command} is no command"
            if command == "cp":
                source, target = rest[:2]
                if target.endswith(".py"):
                    find_recipe(source)
                    copied |= {target: source, str(Path(target).with_suffix(".yaml")): source}
                else:
                    copied[target] = source
                continue
            if command in ("generate", "chat", "demo", "plan"):
                rest = [command, *rest]
            elif command == "bench":
                suites = load_module("mdm_benchmarks", ROOT / "benchmarks/__init__.py") and _suites()
                assert rest[0] in (*suites, "SUITE", "NAME"), rest[0]
                continue
            elif command not in ("run", "validate"):
                continue
            if not rest or PLACEHOLDER.match(rest[0]):
                continue
            recipe, config, overrides = recipe_and_config(rest, copied)
            if recipe.endswith(".py") and not Path(recipe).is_file():
                raise AssertionError(f"{recipe} is neither copied nor shown on this page")
            module = load_recipe(recipe)
            if config is not None and PLACEHOLDER.match(config):
                continue
            overrides = [o for o in overrides if not PLACEHOLDER.match(o)]
            path = find_config(copied.get(config, config) if config else config_of(Path(find_recipe(recipe)), module.CONFIG))
            if "--help" in rest:
                continue
            filled = load(module.Settings, path, overrides)
            for key, node in components(dataclasses.asdict(filled)):
                check(node, key, Anything())
        except Exception as error:
            raise AssertionError(f"{name(page)}, line {line}: mdm {' '.join(words)}: {error}") from error


def _suites():

    return importlib.import_module("mdm_benchmarks.__main__").SUITES


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and Python-Markdown make it."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", lambda m: m[1] or "", heading)
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@pytest.mark.parametrize("page", sorted(PAGES), ids=name)
def test_no_link_is_dead(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        meant = (page.parent / path) if path else page
        assert meant.exists(), f"{name(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", meant.read_text(), re.M)
            assert anchor in map(slug, headings), f"{name(page)}: {target}"


def test_the_readme_is_read_in_ten_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_every_key_of_generate_is_on_its_page_and_none_is_invented():
    keys = load_module("docs_keys", DOCS / "tools/keys.py")
    page = (DOCS / "generate.md").read_text()
    assert keys.renewed(page) == page, "python docs/tools/keys.py makes it anew"
    shown = re.findall(r"^\| `(\w+)` \|", page.partition("<!-- end -->")[0], re.M)
    assert sorted(shown) == sorted(f.name for f in dataclasses.fields(load_recipe("generate").Settings))


SAMPLERS = (
    *("Ancestral", "ReMDM", "FirstHitting", "Confidence", "Threshold", "Factor", "EntropyBounded", "Blocks"),
    *("PerModality", "Psi", "Gibbs", "LeastSureFirst", "SelfCorrect", "Editing", "LeftToRight", "SelfSpeculation", "InOrder"),
    "LearnedRates",
)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_key_of_a_sampler_is_on_the_page(sampler):
    import components.samplers as library
    from components.samplers.drawing import Drawing

    (row,) = re.findall(rf"^\| \[`{sampler}`\]\([^)]*\) \| (.*) \|$", (DOCS / "generate.md").read_text(), re.M)
    shared = {f.name for f in dataclasses.fields(Drawing)}
    for field in dataclasses.fields(getattr(library, sampler)):
        if field.name not in shared:
            assert re.search(rf"`{field.name}(=[^`]*)?`", row), field.name
            default = re.search(rf"`{field.name}=([^`]*)`", row)
            if default and field.default is not dataclasses.MISSING:
                said = {"null": "None", "true": "True", "false": "False"}.get(default[1], default[1])
                assert said == str(field.default)


PROTOCOLS = {
    "schedule": ("components.schedules", "Schedule"),
    "masker": ("components.maskers", "Masker"),
    "sampler": ("components.samplers.base", "Sampler"),
    "tokenizer": ("components.tokenizers", "Tokenizer"),
}


@pytest.mark.parametrize("guide", PROTOCOLS)
def test_a_guide_has_every_member_of_its_protocol(guide):
    module, protocol = PROTOCOLS[guide]
    page = (DOCS / f"guides/{guide}.md").read_text()
    shown = re.findall(r"^\| `(\w+)", page.partition("| --- | --- |")[2].partition("\n\n")[0], re.M)
    assert sorted(shown) == sorted(members(getattr(importlib.import_module(module), protocol)))


def test_what_a_recipe_supplies_is_what_the_guide_says():
    rows = re.findall(r"^\| (\w+) \| `[^|]*\| [^|]* \| ([^|]*) \|$", (DOCS / "guides/recipe.md").read_text(), re.M)
    said = {part: re.findall(r"`(\w+)`", supplied) for part, supplied in rows}
    assert said["masker"] == list(MASKER_SUPPLIED)
    source = {
        name: (ROOT / f"{name}.py").read_text() for name in ("recipes/pretrain", "mdm/data/pipeline", "mdm/evaluation/judges")
    }
    assert said["model"] == re.findall(r"(\w+)=", re.search(r'"model", (vocab_size=self.*)\)', source["recipes/pretrain"])[1])
    assert said["tokenizer"] == re.findall(r"Tokenizer, (\w+)=", source["mdm/data/pipeline"])
    assert said["judge"] == re.findall(r"instantiate\(own, key, (\w+)=", source["mdm/evaluation/judges"])


@pytest.fixture(scope="module")
def compatibility():
    return load_module("docs_compatibility", DOCS / "tools/compatibility.py")


def test_the_compatibility_page_has_whatever_there_is(compatibility):
    """A new scheme, cache, format or sampler is missing from the page until it has been tried."""
    page = (DOCS / "compatibility.md").read_text()
    heads = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\| (?:model|sampler) .*$", page, re.M)]
    assert heads[0][1:] == ["none", *compatibility.SCHEMES]
    one = compatibility.chosen()["Confidence"]
    assert heads[1][1:] == [way for blocks in (False, True) for way, _, _ in compatibility.ways(one, blocks)]
    rows = re.findall(r"^\| ([^|]*) \|", page, re.M)
    assert {compatibility.CALLED[form] for form in compatibility.FORMATS} <= set(rows)
    assert {*compatibility.OURS.values(), *compatibility.IN_BLOCKS.values()} <= set(rows)
    assert {f"`{name}`" for name in SAMPLERS if name != "Blocks"} <= set(rows)


def test_a_cell_is_what_came_of_trying(compatibility):
    model, processor = compatibility.our_model()
    sampler = compatibility.chosen()["Confidence"]
    ways = {way: (built, cache) for way, built, cache in compatibility.ways(sampler)}
    assert compatibility.tried(model, processor, "text", *ways["cache=dual"]) == "yes"
    assert "has to be Blocks" in compatibility.tried(model, processor, "text", sampler, "dual")


def test_a_cell_of_a_model_of_blocks_is_what_came_of_trying(compatibility):
    model, processor = compatibility.our_model(blocks=True)
    for way, built, cache in compatibility.ways(compatibility.chosen()["SelfSpeculation"], blocks=True):
        assert compatibility.tried(model, processor, "text_to_speech", built, cache) == "yes", way
    assert "set cache=exact" in compatibility.tried(model, processor, "text", compatibility.chosen()["Confidence"], "dual")
