"""How much generated text reads like held-out text, whatever kind of model made it: n-gram bits beside entropy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from components.metrics.quality import NGram, distinct, unigram_entropy
from mdm.data.processor import Processor
from mdm.generation.generate import Generated

FIFTH = 5  # each fifth document shows what a real one scores, and is none that the n-grams are of


class Fluency:
    """n-gram bits (low is fluent, or dull), unigram entropy (dull is low here) and the share of different texts.

    documents: held-out samples;  modality: the one that they are of
    """

    def __init__(self, documents: Iterable[Mapping[str, Any]], processor: Processor, modality: str = "text") -> None:
        self.processor, self.modality = processor, modality
        tokenizer = processor.tokenizers[modality]
        self.documents = [tokenizer.encode(s[modality]).tolist() for s in documents]
        kept = [d for i, d in enumerate(self.documents) if i % FIFTH]
        self.ngram = NGram(kept, max(tokenizer.codebooks))

    def __call__(self, made: Generated) -> dict[str, float]:
        """The figures of what was generated, each text up to its end token."""
        vocabulary = self.processor.vocabulary
        own = [row[m] for row, m in zip(made.tokens, made.batch.maskable, strict=True)]
        ends = [[*(row == vocabulary.end_id).tolist(), True].index(True) for row in own]
        texts = [vocabulary.to_codes(self.modality, row[:n]).tolist() for row, n in zip(own, ends, strict=True)]
        return {"forwards": made.forwards.double().mean().item(), **self._of([t for t in texts if t])}

    def beside_real(self, made: Generated) -> dict[str, float]:
        """Bits and entropy of what was generated, and of held-out documents."""
        figures = {"written": self(made), "real": self.real()}
        keys = ("ngram_bits", "entropy_bits")
        return {f"text_{whose}_{k}": own[k] for whose, own in figures.items() for k in keys if k in own}

    def real(self) -> dict[str, float]:
        """The same of held-out documents."""
        return self._of([d for d in self.documents[::FIFTH] if d])

    def _of(self, samples: list[list[int]]) -> dict[str, float]:
        if not samples:
            return {}
        return {"ngram_bits": self.ngram.bits(samples), "entropy_bits": unigram_entropy(samples), "distinct": distinct(samples)}
