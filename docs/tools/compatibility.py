"""What works together: every model with every sampler, cache and quantization is tried, as a tiny one with random weights.

python docs/tools/compatibility.py      tries all of it and writes the tables of docs/compatibility.md anew

A cell is "yes" where a sample came out whole; else it is the reason, in the words of the error. Nothing here is a list of what
should work: another scheme, format or cache is tried as soon as the library has it.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

import mdm  # noqa: F401  (before torchao)
from components import samplers as s
from components.orders import Permuted
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import JsonTokenizer, TextTokenizer
from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.generation.canvas import CACHES
from mdm.generation.generate import generate
from mdm.models.folder import load_model
from mdm.models.open_formats import FORMATS
from mdm.models.open_models import save_open
from mdm.models.quantization import SCHEMES, quantize
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig

PAGE = Path(__file__).parents[1] / "compatibility.md"
CALLED = {
    "llada": "LLaDA",
    "dream": "Dream",
    "llada_moe": "LLaDA-MoE",
    "llada2": "LLaDA2",
    "sdar": "SDAR",
    "qwen3": "Qwen3",
    "llama": "Llama",
}
OURS = {
    "text": "ours, text",
    "text_to_image": "ours, text to image",
    "text_to_speech": "ours, text to speech",
}
IN_BLOCKS = {task: name.replace("ours", "ours in blocks") for task, name in OURS.items()}
SHAPE: dict[str, Any] = {"width": 64, "num_layers": 2, "num_heads": 4, "max_length": 128}
BLOCK = 4
SIZES = {"text": BLOCK, "audio": 8}  # of our model of blocks; its images are whole


def chosen() -> dict[str, Any]:
    """Every sampler, by its name."""
    one = s.Confidence(num_steps=4)
    return {
        "Ancestral": s.Ancestral(num_steps=4),
        "ReMDM": s.ReMDM(num_steps=8),
        "FirstHitting": s.FirstHitting(),
        "Confidence": one,
        "Threshold": s.Threshold(threshold=0.5),
        "Factor": s.Factor(factor=1.0),
        "EntropyBounded": s.EntropyBounded(gamma=1.0),
        "Editing": s.Editing(threshold=0.5, edit_threshold=0.9),
        "Psi": s.Psi(num_steps=8),
        "Gibbs": s.Gibbs(s.Ancestral(num_steps=4)),
        "LeastSureFirst": s.LeastSureFirst(num_steps=4),
        "SelfCorrect": s.SelfCorrect(one, passes=4),
        "PerModality": s.PerModality([one, s.FirstHitting(), one]),
        "InOrder": s.InOrder(order=Permuted(group=2)),
        "LeftToRight": s.LeftToRight(),
        "SelfSpeculation": s.SelfSpeculation(),
        "LearnedRates": s.LearnedRates(num_steps=4),
    }


def open_model(name: str, folder: Path) -> tuple[MaskedDiffusionModel, Processor]:
    """A tiny model of an open format: written in that format, and opened as anybody's would be."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    form = FORMATS[name]
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    words.save(str(folder / "tokenizer.json"))
    experts = {"num_experts": 4, "experts_per_token": 2} if "num_experts" in form.keys else {}
    blocks = {"blocks": {"text": BLOCK}, "blocks_from_start": True} if form.blocks is not None else {}
    config = ModelConfig(vocab_size=64, ffn_width=64, **SHAPE, **dict(form.fixed), **experts, **blocks)
    processor = Processor(
        Vocabulary.of_text(64, mask=62, pad=61, end=61),
        {"text": JsonTokenizer(str(folder / "tokenizer.json"), size=64)},
        {},
    )
    model = MaskedDiffusionModel(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_open(folder / name, model, processor, form)
    return load_model(folder / name)


def our_model(blocks: bool = False) -> tuple[MaskedDiffusionModel, Processor]:
    """A tiny model of text, images and speech. blocks: a model of blocks, whose finished tokens predict the next."""
    words = TextTokenizer.train(["a handwritten seven", "a spoken nine"] * 20, vocab_size=280)
    tokenizers = {"text": words, "image": GreyPatchTokenizer(8, 2, 3), "audio": Codec2Tokenizer()}
    processor = Processor.build(tokenizers, {"text": 4, "image": 16, "audio": 16})
    own: dict[str, Any] = {"blocks": SIZES, "causal": True} if blocks else {}
    model = MaskedDiffusionModel(ModelConfig(vocab_size=processor.vocabulary.size, ffn_width=64, **SHAPE, **own))
    model.init_weights(torch.Generator().manual_seed(0))
    return model, processor


def attempt(work: Any) -> str:
    """What came of it: yes, or why not, in a line."""
    try:
        work()
    except (UserError, ValueError, NotImplementedError, RuntimeError) as error:
        return re.sub(r"\s+", " ", str(error)).strip()
    return "yes"


def tried(model: MaskedDiffusionModel, processor: Processor, task: str, sampler: Any, cache: str) -> str:
    """Whether a sample of a task comes out whole."""

    def work() -> None:
        prompt = {"text": "a handwritten seven"} if task != "text" else {}
        made = generate(
            model,
            processor,
            task,
            [prompt] * 2,
            sampler,
            0.0,
            cache=cache,
            length=16 if task == "text" else None,
        )
        if bool((made.tokens == processor.vocabulary.mask_id).any()):
            raise ValueError("masks are left")

    return attempt(work)


def ways(sampler: Any, blocks: bool = False) -> Iterator[tuple[str, Any, str]]:
    """A sampler alone, in blocks, and in blocks with each cache; of a model of blocks with either of its caches.

    What it is called, what samples, the cache.
    """
    if blocks:
        yield from ((f"model of blocks, cache={cache}", sampler, cache) for cache in ("exact", "off"))
        return
    yield "alone", sampler, "off"
    for cache in CACHES:
        yield ("in blocks" if cache == "off" else f"cache={cache}"), s.Blocks(sampler, BLOCK), cache


def every_cell() -> Iterator[tuple[str, str, str, str, str]]:
    """(model, scheme, sampler, way, what came of it) of everything there is."""
    with tempfile.TemporaryDirectory() as folder:
        ours = {"ours": OURS, "blocks": IN_BLOCKS}
        for kind in (*FORMATS, *ours):
            for scheme in ("none", *SCHEMES):
                own = Path(folder, f"{kind}_{scheme}")
                own.mkdir()
                model, processor = our_model(kind == "blocks") if kind in ours else open_model(kind, own)
                why = "yes" if scheme == "none" else attempt(lambda model=model, scheme=scheme: quantize(model, scheme))
                for task, name in ours.get(kind, {"text": CALLED.get(kind, kind)}).items():
                    for called, sampler in chosen().items():
                        for way, built, cache in ways(sampler, bool(model.config.blocks)):
                            found = tried(model, processor, task, built, cache) if why == "yes" else why
                            yield name, scheme, called, way, found


def told(results: list[str], notes: list[str]) -> str:
    """A cell of a summary: yes where all are, else the number of the note that says why."""
    bad = list(dict.fromkeys(found for found in results if found != "yes"))
    if not bad:
        return "yes"
    for why in bad:
        if why not in notes:
            notes.append(why)
    some = "" if all(found != "yes" for found in results) else "in part "
    return f"{some or 'no '}" + " ".join(f"[{notes.index(why) + 1}]" for why in bad)


def tables(cells: list[tuple[str, str, str, str, str]]) -> str:
    """The page's tables: quantization of each model, and ways of each sampler; every "no" with its reason."""
    notes: list[str] = []
    runs = [c for c in cells if not all(r[4] != "yes" for r in cells if r[:2] == c[:2])]  # of schemes that run here
    names, schemes = dict.fromkeys(c[0] for c in cells), dict.fromkeys(c[1] for c in cells)
    used, how = dict.fromkeys(c[2] for c in cells), dict.fromkeys(c[3] for c in cells)
    lines = ["| model | " + " | ".join(schemes) + " |", "| --- |" + " --- |" * len(schemes)]
    for name in names:
        row = [
            "yes"
            if any(c[4] == "yes" for c in cells if c[:2] == (name, q))
            else told([c[4] for c in cells if c[:2] == (name, q)], notes)
            for q in schemes
        ]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", "| sampler | " + " | ".join(how) + " |", "| --- |" + " --- |" * len(how)]
    for sampler in used:
        row = [told([c[4] for c in runs if c[2] == sampler and c[3] == way], notes) for way in how]
        lines.append(f"| `{sampler}` | " + " | ".join(row) + " |")
    worked = sum(c[4] == "yes" for c in cells)
    lines += ["", f"{len(cells)} cells were tried: {worked} work."]
    lines += ["", *(f"{i}. {why.replace('<', '&lt;')}" for i, why in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.manual_seed(0)
    cells = list(tqdm(every_cell(), unit="cell"))
    torch_version = torch.__version__
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    head = f"On {where}, torch {torch_version}, Python {sys.version_info[0]}.{sys.version_info[1]}.\n\n"
    page = PAGE.read_text()
    begin, end = "<!-- tried -->\n", "<!-- end -->"
    before, after = page.partition(begin)[0], page.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n{head}{tables(cells)}\n{end}{after}")
    print(
        json.dumps(
            {found: sum(c[4] == found for c in cells) for found in dict.fromkeys(c[4] for c in cells)},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
