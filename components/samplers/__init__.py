"""Samplers: start from masks (beside what is given), unmask until none is left. They drive any model.

    tokens = sample(Ancestral(num_steps=16), logits_fn, tokens, mask_id)

A sampler is a step `(logits, state) -> state`; `logits_fn(tokens) -> logits` is all it knows of a model.

    ancestral.py      the reverse process on a time grid (MDLM)
    first_hitting.py  one token at a time, exactly (2409.02908)
    confidence.py     the most confident first (MaskGIT, LLaDA)
    guidance.py       classifier-free guidance as a logits function around another
    categorical.py    drawing tokens: temperature, top-p, float64 Gumbel noise
"""

from components.samplers.ancestral import Ancestral
from components.samplers.base import LogitsFn, Sampler, SamplerState, sample
from components.samplers.confidence import Confidence
from components.samplers.first_hitting import FirstHitting
from components.samplers.guidance import guided

__all__ = ["Ancestral", "Confidence", "FirstHitting", "LogitsFn", "Sampler", "SamplerState", "guided", "sample"]
