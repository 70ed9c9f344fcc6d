"""The code of others beside ours, from checkouts that you name: equal shapes, equal tokens, equal weights where they can be.

    python -m benchmarks peers --checkouts FOLDER

FOLDER holds any of these, as `git clone` names them; what is missing, or cannot be imported here, is listed as not measured:

    LLaDA      github.com/ML-GSAI/LLaDA        generate.py: the reference decoding
    Fast-dLLM  github.com/NVlabs/Fast-dLLM     llada/model: LLaDA's modelling code, its training step with the loss of LLaDA's
                                               guidelines; llada/generate.py: prefix and dual caches
    mdlm       github.com/kuleshov-group/mdlm  models/dit.py: model and training (flash-attn, a GPU)
    unidisc    github.com/alexanderswerdlow/unidisc  models/dit.py: model and training, with PyTorch's attention

LLaDA's code and Fast-dLLM's need the transformers that they were written for (4.46). Stated differences: MDLM's model has a
time input and adaptive norms (more parameters), and like UniDisc's GELU and dropout; ours has QK-norm and SwiGLU. dLLM trains
LLaDA's own model, by the same loss; its own trainer has no adapter yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer, models

from benchmarks.measure import Result, Timing, interleaved, peak_memory, rows
from benchmarks.train import build, masked_only, random_batch
from components.maskers import BernoulliMasker
from components.samplers import Blocks, Confidence
from components.sequences import collate
from components.vocabulary import Vocabulary
from mdm.checkpoint import load_model
from mdm.data import LossSettings, micro_batch
from mdm.editing import Edit
from mdm.evaluation import forward_loss
from mdm.generation import generate
from mdm.hardware import Hardware, can_compile, compile_blocks

LLADA_CPU = {"d_model": 256, "n_heads": 4, "n_layers": 4, "mlp_hidden_size": 768, "vocab_size": 2_000}
LLADA_8B = {"d_model": 4096, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288, "vocab_size": 126_464}
TRAIN_CPU = {"width": 256, "num_layers": 4, "vocab": 50_000, "length": 128, "rows": 16}
TRAIN_GPU = {"width": 768, "num_layers": 12, "vocab": 50_000, "length": 1024, "rows": 32}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "llada": {**LLADA_CPU, "d_model": 64, "n_layers": 2},
        "prompt": 16,
        "new": 16,
        "block": 8,
        "warmup": 1,
        "repeats": 2,
    },
    "cpu": {"llada": LLADA_CPU, "train": TRAIN_CPU, "prompt": 64, "new": 64, "block": 32, "warmup": 1, "repeats": 5},
    "gpu": {"llada": LLADA_8B, "train": TRAIN_GPU, "prompt": 128, "new": 256, "block": 32, "warmup": 2, "repeats": 5},
}


def run(preset: str, checkouts: str | None = None) -> Result:
    if checkouts is None or not Path(checkouts).is_dir():
        raise SystemExit("python -m benchmarks peers: --checkouts FOLDER, a folder with LLaDA, Fast-dLLM or mdlm checked out")
    p, folder = PRESETS[preset], Path(checkouts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timings: dict[str, Timing] = {}
    work: dict[str, float] = {}
    more: dict[str, dict[str, float]] = {}
    figures: dict[str, float] = {}
    unmeasured = ["dLLM's own trainer: no adapter yet"]
    suites = {
        "LLaDA and Fast-dLLM, sampling": sampling,
        "LLaDA, training": llada_training,
        "MDLM, training": mdlm_training,
        "UniDisc, training": unidisc_training,
    }
    for name, suite in suites.items():
        try:
            variants, amount, found = suite(p, folder, device)
            own = interleaved(variants, p["warmup"], p["repeats"])
        except (ImportError, FileNotFoundError, AttributeError) as error:
            unmeasured.append(f"{name}: {error}")
            continue
        first = next(iter(own))
        timings |= own
        work |= dict.fromkeys(own, amount)
        more |= {n: {"against": own[first].median / t.median, "GiB": peak_memory(variants[n])} for n, t in own.items()}
        figures |= found() | {f"{n} against {first}": own[first].median / t.median for n, t in list(own.items())[1:]}
    if not timings:
        raise SystemExit("python -m benchmarks peers: nothing could be measured\n" + "\n".join(unmeasured))
    return Result("peers", preset, "tokens/s", p, rows(timings, work, more), figures, unmeasured)


Suite = tuple[dict[str, Callable[[], object]], float, Callable[[], dict[str, float]]]


def sampling(p: dict[str, Any], folder: Path, device: torch.device) -> Suite:
    """Greedy decoding of equal weights, one token a pass: LLaDA's loop and Fast-dLLM's caches, and ours."""
    theirs, config, cached = llada(p, folder, device, p["prompt"] + p["new"] + 8)
    reference = script(folder / "LLaDA" / "generate.py") if (folder / "LLaDA").is_dir() else cached
    mask_id = config.mask_token_id
    theirs.eval()
    ours, processor = same_weights(theirs, config, device)
    ids = torch.randint(0, mask_id - 1, (p["prompt"],), generator=torch.Generator().manual_seed(0))
    prompt = ids[None].to(device)
    settings = {"steps": p["new"], "gen_length": p["new"], "block_length": p["block"], "temperature": 0.0, "mask_id": mask_id}
    made: dict[str, torch.Tensor] = {}

    def of_theirs(name: str, function: Any) -> Callable[[], None]:
        def call() -> None:
            out = function(theirs, prompt, **settings)
            made[name] = (out[0] if isinstance(out, tuple) else out)[0, p["prompt"] :].cpu()

        return call

    def of_ours(name: str, model: Any, cache: str) -> Callable[[], None]:
        whole = torch.cat([ids, torch.full((p["new"],), mask_id)])
        edit = {"text": Edit(whole, torch.arange(len(whole)) >= p["prompt"])}
        sampler = Blocks(Confidence(num_steps=p["block"], temperature=0.0), p["block"])

        def call() -> None:
            out = generate(model, processor, "text", [edit], sampler, 0.0, cache=cache, stop_at_end=False)
            made[name] = out.tokens[0][out.batch.maskable[0]][-p["new"] :].cpu()

        return call

    variants = {
        "LLaDA's generate": of_theirs("LLaDA's generate", reference.generate),
        "ours, eager": of_ours("ours, eager", ours, "off"),
        "Fast-dLLM, prefix cache": of_theirs("Fast-dLLM, prefix cache", cached.generate_with_prefix_cache),
        "ours, prefix cache": of_ours("ours, prefix cache", ours, "prefix"),
        "Fast-dLLM, dual cache": of_theirs("Fast-dLLM, dual cache", cached.generate_with_dual_cache),
        "ours, dual cache": of_ours("ours, dual cache", ours, "dual"),
    }
    if can_compile(device):
        compiled, _ = same_weights(theirs, config, device)
        compile_blocks(compiled, "true", Hardware(device, 0, 1, False))
        variants |= {
            "ours, compiled": of_ours("ours, compiled", compiled, "off"),
            "ours, compiled, dual cache": of_ours("ours, compiled, dual cache", compiled, "dual"),
        }

    def agreement() -> dict[str, float]:
        pairs = [("ours, eager", "LLaDA's generate"), ("ours, dual cache", "Fast-dLLM, dual cache")]
        pairs += [("ours, prefix cache", "Fast-dLLM, prefix cache"), ("ours, compiled", "LLaDA's generate")]
        return {f"same tokens: {a} and {b}": float((made[a] == made[b]).float().mean()) for a, b in pairs if a in made}

    return variants, float(p["new"]), agreement


def llada(p: dict[str, Any], folder: Path, device: torch.device, length: int) -> tuple[Any, Any, ModuleType]:
    """LLaDA's model with random weights, its config, and Fast-dLLM's decoding."""
    fast = folder / "Fast-dLLM" / "llada"
    with importing(fast):
        configuration = importlib.import_module("model.configuration_llada")
        modelling = importlib.import_module("model.modeling_llada")
        cached = script(fast / "generate.py")
    mask_id = p["llada"]["vocab_size"] - 2
    config = configuration.LLaDAConfig(
        **p["llada"], n_kv_heads=p["llada"]["n_heads"], activation_type="silu", block_type="llama", rope=True,
        layer_norm_type="rms", max_sequence_length=length, rope_theta=500_000.0, embedding_size=p["llada"]["vocab_size"],
        weight_tying=False, include_bias=False, include_qkv_bias=False, mask_token_id=mask_id, eos_token_id=mask_id - 1,
        pad_token_id=mask_id - 1, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0, alibi=False,
        rms_norm_eps=1e-5, scale_logits=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = modelling.LLaDAModelLM(config, init_params=True).to(device, _dtype(device))
    with torch.no_grad():
        theirs.model.transformer.ff_out.weight[mask_id] = 0  # ours never draws the mask token; so theirs will not either
    return theirs, config, cached


def llada_training(p: dict[str, Any], folder: Path, device: torch.device) -> Suite:
    """Forward and backward of LLaDA's model with the loss of its guidelines, and of ours: equal weights, rows and masks.

    Theirs computes every position's logits, over all ids: the mask token's too, which ours rules out.
    """
    if "train" not in p:
        raise ImportError("not in this preset")
    rows_, length = p["train"]["rows"], p["train"]["length"]
    theirs, config, _ = llada(p, folder, device, length)
    ours, processor = same_weights(theirs, config, device)
    vocabulary = processor.vocabulary
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.mask_token_id - 1, (rows_, length - 8), generator=g)
    batch = collate([[processor.text_sequence(row)] for row in ids], [[i] for i in range(rows_)], vocabulary.pad_id)
    masker = BernoulliMasker(vocabulary.mask_id)
    micro = micro_batch(batch, masker, LossSettings(reduction="token"), len(vocabulary.ranges)).to(device)
    noisy, losses = micro.noisy, {}

    def their_step() -> None:
        theirs.zero_grad()
        logits = theirs(input_ids=noisy.noisy).logits
        ce = torch.nn.functional.cross_entropy(logits[noisy.mask], noisy.clean.tokens[noisy.mask], reduction="none")
        loss = (ce * noisy.weight[noisy.mask]).sum() / micro.denominator
        loss.backward()
        losses["theirs"] = loss.detach()

    def our_step(model: Any) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad()
            loss = forward_loss(model, micro, vocabulary, Hardware(device, 0, 1, False)).loss / micro.denominator
            loss.backward()
            losses["ours"] = loss.detach()

        return step

    variants = {"LLaDA's model and loss": their_step, "ours, training LLaDA's weights": our_step(ours)}
    if can_compile(device):
        compiled, _ = same_weights(theirs, config, device)
        compile_blocks(compiled, "true", Hardware(device, 0, 1, False))
        variants["ours, compiled, training LLaDA's weights"] = our_step(compiled)

    def agreement() -> dict[str, float]:
        return {"training loss: ours / LLaDA's": float(losses["ours"] / losses["theirs"])}

    return variants, float(batch.num_tokens), agreement


def same_weights(theirs: Any, config: Any, device: torch.device) -> Any:
    """Our model with their weights, as a checkpoint on disk would load."""
    with tempfile.TemporaryDirectory() as folder:
        state = {k: v.detach().cpu().contiguous().clone() for k, v in theirs.state_dict().items()}
        safetensors.torch.save_file(state, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(
            json.dumps({**config.to_dict(), "architectures": ["LLaDAModelLM"]}, default=str)
        )
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size - 3)}, unk_token="w0"))
        words.save(str(Path(folder) / "tokenizer.json"))
        model, processor = load_model(folder, device)
    return model.to(_dtype(device)), processor


def mdlm_training(p: dict[str, Any], folder: Path, device: torch.device) -> Suite:
    """MDLM's model with its NELBO beside ours, bf16."""
    if device.type != "cuda":
        raise ImportError("flash-attn needs a GPU")
    dit = script(folder / "mdlm" / "models" / "dit.py")

    def build_theirs(t: dict[str, int], vocabulary: Vocabulary) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
        config = {"hidden_size": t["width"], "cond_dim": 128, "n_blocks": t["num_layers"], "n_heads": t["width"] // 64,
                  "length": t["length"], "scale_by_sigma": True, "dropout": 0.1, "tie_word_embeddings": False}  # fmt: skip
        model = dit.DIT({"model": config}, vocabulary.size).to(device)
        return model, lambda noisy: model(noisy, torch.ones(t["rows"], device=device))

    return beside(p, device, "MDLM's model", build_theirs)


def unidisc_training(p: dict[str, Any], folder: Path, device: torch.device) -> Suite:
    """UniDisc's model (no time input, PyTorch's attention) with the NELBO beside ours."""
    with importing(folder / "unidisc"):
        os.environ.setdefault("UNIDISC_FORCE_DISABLE_FA3", "1")
        dit = importlib.import_module("models.dit")

    def build_theirs(t: dict[str, int], vocabulary: Vocabulary) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
        config = {
            "time_conditioning": False, "parameterization": "subs",
            "model": {"hidden_size": t["width"], "cond_dim": 128, "n_blocks": t["num_layers"], "n_heads": t["width"] // 64,
                      "length": t["length"], "txt_length": t["length"], "img_length": 0, "scale_by_sigma": True, "dropout": 0.1,
                      "full_attention": True, "use_spda_attn": True, "attn_type": "flash", "force_varlen_attn": False,
                      "norm_type": "layernorm", "qk_norm": False, "zero_linear_init": True, "modality_embed": False,
                      "rope_2d": False, "force_optimized_native_attn": False},
            "trainer": {"image_mode": "discrete", "multimodal_batches": False, "compile_flag_pos_emb": True},
            "data": {"require_sample_ids": False},
        }  # fmt: skip
        dtype = _dtype(device)
        model = dit.DIT(config, vocabulary.size, t["vocab"], vocabulary.mask_id, dtype=dtype).to(device)
        return model, model

    return beside(p, device, "UniDisc's model", build_theirs)


def beside(p: dict[str, Any], device: torch.device, name: str, build_theirs: Callable[..., Any]) -> Suite:
    """Forward and backward of a model with logits everywhere and the NELBO, and of ours: the same rows and masks."""
    if "train" not in p:
        raise ImportError("not in this preset")
    t = p["train"]
    vocabulary = Vocabulary.build({"text": (t["vocab"],)}, tasks=("text",))
    micro, _ = random_batch(vocabulary, t["rows"], t["length"], device)
    theirs, logits_fn = build_theirs(t, vocabulary)
    noisy, weight = micro.noisy, micro.noisy.weight

    def their_step() -> None:
        theirs.zero_grad()
        logits = logits_fn(noisy.noisy).float()
        logits[:, :, vocabulary.mask_id] = -1e6
        ce = torch.nn.functional.cross_entropy(logits.transpose(1, 2), noisy.clean.tokens, reduction="none")
        (weight * noisy.mask * ce).mean().backward()

    hw = Hardware(device, 0, 1, device.type == "cuda")
    variants = {name: their_step, f"ours, beside {name}": masked_only(build(vocabulary, t, device), micro, vocabulary, hw)}
    if can_compile(device):
        ours = build(vocabulary, t, device, compiled=True)
        variants[f"ours, compiled, beside {name}"] = masked_only(ours, micro, vocabulary, hw)
    return variants, float(t["rows"] * t["length"]), dict


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class importing:
    """A folder in front of the import path, for modules that import each other by short names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no checkout at {self.folder}")
        sys.path.insert(0, str(self.folder))

    def __exit__(self, *_: object) -> None:
        sys.path.remove(str(self.folder))


def script(path: Path) -> ModuleType:
    """A Python file as a module."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
