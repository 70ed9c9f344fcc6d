"""Samplers: start from masks (beside what is given), unmask until none is left. They drive any model.

    tokens = sample(Ancestral(num_steps=16), logits_fn, tokens, mask_id).tokens

A sampler is a step `(logits, state) -> state`; `logits_fn(tokens) -> logits` is all it knows of a model.

    ancestral.py      the reverse process on a time grid (MDLM)
    remasking.py      the same, masking decoded tokens again (ReMDM)
    any_noise/        where a token may become any other: any kernel's step, Psi, Gibbs, LeastSureFirst, SelfCorrect, Editing
    first_hitting.py  one token at a time, exactly (2409.02908)
    confidence.py     the surest first, a fixed number a step (MaskGIT, LLaDA; margin, entropy)
    adaptive.py       as many as are sure enough (threshold, factor, entropy-bounded)
    left_to_right.py  the autoregressive mode of a model of blocks, and drafts by diffusion that it judges
    orders/           in an order that is drawn beforehand, or at rates that the model has learned
    composite.py      in blocks from left to right; another sampler for each modality
    guidance.py       classifier-free guidance as a logits function around another
    constraints.py    rules on what has been drawn: end of text
    drawing.py        drawing tokens: temperature, top-k, top-p
    ranking.py        what "surest" means
"""

from components.samplers.adaptive import EntropyBounded, Factor, Threshold
from components.samplers.ancestral import Ancestral
from components.samplers.any_noise.correcting import SelfCorrect
from components.samplers.any_noise.editing import Editing
from components.samplers.any_noise.gibbs import Gibbs
from components.samplers.any_noise.least_sure import LeastSureFirst
from components.samplers.any_noise.psi import Psi
from components.samplers.base import LogitsFn, Sampled, Sampler, Selectable, Starting, deterministic, sample
from components.samplers.composite import Blocks, PerModality
from components.samplers.confidence import Confidence
from components.samplers.constraints import FillAfterEnd
from components.samplers.first_hitting import FirstHitting
from components.samplers.guidance import LinearScale, guided
from components.samplers.left_to_right import LeftToRight, SelfSpeculation
from components.samplers.orders.in_order import InOrder
from components.samplers.orders.learned_rates import LearnedRates
from components.samplers.remasking import ReMDM
from components.samplers.state import SamplerState

__all__ = [
    "Ancestral",
    "Blocks",
    "Confidence",
    "Editing",
    "EntropyBounded",
    "Factor",
    "FillAfterEnd",
    "FirstHitting",
    "Gibbs",
    "InOrder",
    "LearnedRates",
    "LeastSureFirst",
    "LeftToRight",
    "LinearScale",
    "LogitsFn",
    "PerModality",
    "Psi",
    "ReMDM",
    "Sampled",
    "Sampler",
    "SamplerState",
    "Selectable",
    "SelfCorrect",
    "SelfSpeculation",
    "Starting",
    "Threshold",
    "deterministic",
    "guided",
    "sample",
]
