"""Retrieval quality of a sentence encoder: what a compressed model costs, in answers found.

    e_i    = normalise(sum_t m_it h_it / sum_t m_it)             mean pooling, then L2
    rank_i = |{ j : <q_i, d_j> >= <q_i, d_i> }|                  1 is best; ties count against the model
    acc@1  = mean_i [rank_i = 1]        MRR = mean_i 1 / rank_i

Query i's one right answer is document i; documents past the last query are distractors. Because ties count
against, a model that collapsed to a constant scores 1/N and not 1. Not handled: several right answers (a
document given twice makes both its queries miss: pass distinct documents), and an index: all scores are
computed.

Judge a compressed model by `paired_difference` to its original on the same items, never by two separate
scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.errors import CalibrationError

Progress = Callable[[int, int], None]
"""Called as progress(texts done, texts in all) after each batch."""

_RESAMPLES_AT_ONCE = 256  # keeps the bootstrap's index table at a few MB for thousands of items


@dataclass(frozen=True)
class RetrievalScores:
    """How often and how high the right document came; `reciprocal_ranks[i]` is 1 / rank_i, in (0, 1]."""

    reciprocal_ranks: tuple[float, ...]

    @property
    def acc_at_1(self) -> float:
        """The share of queries whose right document came strictly first."""
        return sum(r == 1.0 for r in self.reciprocal_ranks) / len(self.reciprocal_ranks)

    @property
    def mrr(self) -> float:
        """The mean reciprocal rank."""
        return sum(self.reciprocal_ranks) / len(self.reciprocal_ranks)

    def __str__(self) -> str:
        return f"acc@1 {self.acc_at_1:.3f}, MRR {self.mrr:.3f} ({len(self.reciprocal_ranks)} queries)"


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that the mask keeps, accumulated in fp32.

    hidden: (B, T, D), any floating dtype. mask: (B, T), nonzero where a token is real. Returns (B, D) fp32;
    a row whose mask is all zero gives zeros. What stands at masked positions, NaN included, does not
    matter.
    """
    keep = mask.to(hidden.device).bool().unsqueeze(-1)  # (B, T, 1)
    total = torch.where(keep, hidden.float(), 0.0).sum(dim=1)  # (B, D)
    return total / keep.sum(dim=1).clamp(min=1)


def embed(
    model: Callable[..., Any],
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    batch_size: int = 8,
    multiple: int = 8,
    progress: Progress | None = None,
) -> Tensor:
    """One unit vector per text, in the order given: (N, D) fp32 on the CPU.

    model: called with all the tokenizer yields (input_ids, attention_mask, token_type_ids if any), each (B,
    T) int64, on `model.device` where it has one. Its result has last_hidden_state (B, T, D), as an
    attribute or a key, or is a sequence whose first member is that. texts: N >= 1, each cut to max_length
    tokens. Texts of like length share a batch, and T is padded up to a `multiple`; `multiple=max_length`
    feeds a model of one fixed length. The last batch may be smaller than batch_size.
    """
    if not texts:
        raise CalibrationError("no texts to embed", required="at least one text", found="an empty sequence")
    device = getattr(model, "device", "cpu")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])  # longest first: memory peaks at once
    vectors: list[Tensor] = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = {name: [values[i] for i in chosen] for name, values in encoded.items()}
        batch = tokenizer.pad(rows, padding=True, pad_to_multiple_of=multiple, return_tensors="pt")
        batch = {name: value.to(device) for name, value in batch.items()}  # each (B, T)
        with torch.no_grad():
            hidden = _last_hidden_state(model(**batch))  # (B, T, D)
            pooled = mean_pool(hidden, batch["attention_mask"])  # (B, D)
            vectors.append(torch.nn.functional.normalize(pooled, dim=-1).cpu())
        if progress is not None:
            progress(start + len(chosen), len(order))
    found = torch.cat(vectors)  # (N, D), in the order of `order`
    result = torch.empty_like(found)
    result[torch.tensor(order)] = found
    return result


def _last_hidden_state(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None and isinstance(output, Mapping):
        hidden = output.get("last_hidden_state")
    elif hidden is None and isinstance(output, tuple | list) and output:
        hidden = output[0]
    if not isinstance(hidden, Tensor | np.ndarray) or hidden.ndim != 3:
        raise CalibrationError(
            "the model's output holds no token vectors to pool",
            required="last_hidden_state, or a tuple whose first member is a tensor (batch, tokens, width)",
            found=type(output).__name__,
        )
    return torch.as_tensor(hidden)


def retrieval_scores(queries: Tensor, documents: Tensor) -> RetrievalScores:
    """Rank all documents for every query by dot product; document i is query i's right answer.

    queries: (Nq, D), documents: (Nd, D) with Nd >= Nq >= 1, floating, finite, on one device. Scores are
    computed in fp32 at least. Raises CalibrationError for shapes that do not fit and for vectors that are
    not finite.
    """
    fit = queries.ndim == documents.ndim == 2 and queries.shape[-1] == documents.shape[-1]
    if not fit or not 1 <= len(queries) <= len(documents):
        raise CalibrationError(
            "queries and documents do not fit each other",
            required="(Nq, D) and (Nd, D) with Nd >= Nq >= 1",
            found=f"{tuple(queries.shape)} and {tuple(documents.shape)}",
        )
    if not (queries.isfinite().all() and documents.isfinite().all()):
        raise CalibrationError("an embedding is not finite", required="finite vectors", found="NaN or infinity")
    dtype = torch.promote_types(torch.promote_types(queries.dtype, documents.dtype), torch.float32)
    scores = queries.to(dtype) @ documents.to(dtype).T  # (Nq, Nd)
    ranks = (scores >= scores.diagonal().unsqueeze(1)).sum(dim=1)  # (Nq,), >= 1: the right one counts
    return RetrievalScores(tuple(1.0 / rank for rank in ranks.tolist()))


def paired_difference(
    a: Sequence[float], b: Sequence[float], seed: int = 0, *, resamples: int = 2000
) -> tuple[float, tuple[float, float]]:
    """mean(a - b) over the same items, and the 95 % percentile bootstrap interval of that mean.

    a, b: N >= 1 per-item scores each, such as `reciprocal_ranks`, in the same order. Items are resampled,
    each with both its scores, so what is hard for both models cancels. Same seed, same interval.
    """
    if len(a) != len(b) or not len(a):
        raise CalibrationError(
            "a paired difference needs the same items twice",
            required="two sequences of one length >= 1",
            found=f"{len(a)} and {len(b)} scores",
        )
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)  # (N,)
    generator = np.random.default_rng(seed)
    means = [
        difference[generator.integers(len(difference), size=(count, len(difference)))].mean(axis=1)
        for count in _chunks(resamples, _RESAMPLES_AT_ONCE)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))  # over (resamples,)
    return float(difference.mean()), (float(low), float(high))


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
