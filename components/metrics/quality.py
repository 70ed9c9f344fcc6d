"""How good a set of samples is, beside a judge's accuracy: accuracy alone is won by one prototype for each class.

    Frechet distance   |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of Gaussians in a judge's features (1706.08500)
distinct           share of samples that are no copy of an earlier one
n-gram bits        cross-entropy of generated text under a model of held-out text; low is fluent, or dull
unigram entropy    of the generated tokens: dull is low here
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def frechet(a: Float[np.ndarray, "n features"], b: Float[np.ndarray, "m features"]) -> float:
    """The Frechet distance between two sets of features. Raises ValueError for fewer than two samples."""
    import scipy.linalg

    if min(len(a), len(b)) < 2:
        raise ValueError(f"frechet: both sets need at least two samples, got {len(a)} and {len(b)}")
    means = a.mean(axis=0) - b.mean(axis=0)
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # the eigenvalues of a product of two covariances are real and not negative; rounding leaves small other parts
    root = np.sqrt(np.clip(np.real(scipy.linalg.eigvals(c_a @ c_b)), 0, None)).sum()
    return float(means @ means + np.trace(c_a) + np.trace(c_b) - 2 * root)


def distinct(samples: Sequence[Sequence[int]]) -> float:
    """The share of different ones among the samples."""
    return len({tuple(s) for s in samples}) / len(samples)


def unigram_entropy(samples: Sequence[Sequence[int]]) -> float:
    """Entropy of the tokens' frequencies over all samples, in bits."""
    counts = np.array(list(Counter(t for s in samples for t in s).values()), dtype=float)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


class NGram:
    """An interpolated n-gram model (Witten-Bell), whose last resort is the uniform distribution.

    p(w | h) = (c(h w) + T(h) p(w | h without its first)) / (c(h) + T(h)),    T(h) the number of different words after h
    """

    def __init__(self, documents: Sequence[Sequence[int]], vocab_size: int, order: int = 3) -> None:
        self.vocab_size = vocab_size
        self.order = order
        self.counts: dict[tuple[int, ...], Counter[int]] = {}
        for document in documents:
            for i, word in enumerate(document):
                for n in range(min(order, i + 1)):
                    self.counts.setdefault(tuple(document[i - n : i]), Counter())[word] += 1

    def probability(self, word: int, history: tuple[int, ...]) -> float:
        """p(word | the last order - 1 of the history)."""
        p = 1 / self.vocab_size
        for n in range(min(self.order - 1, len(history)) + 1):
            after = self.counts.get(history[len(history) - n :])
            if after is None:
                break
            p = (after[word] + len(after) * p) / (after.total() + len(after))
        return p

    def bits(self, samples: Sequence[Sequence[int]]) -> float:
        """Cross-entropy of the samples in bits a token."""
        total = sum(
            np.log2(self.probability(w, tuple(s[max(0, i - self.order + 1) : i]))) for s in samples for i, w in enumerate(s)
        )
        return float(-total / sum(map(len, samples)))
