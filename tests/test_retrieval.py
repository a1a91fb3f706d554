"""Retrieval's numbers obey their laws; the trained encoder itself is in test_assets.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dwindle.frontends.retrieval import embed, mean_pool, paired_difference, retrieval_scores
from dwindle.runtime.errors import CalibrationError

law = settings(deadline=None, max_examples=50)  # a shared machine pauses for longer than any deadline

# Whole numbers, so that every dot product is exact and order of summation cannot break or make a tie.
MATRIX = st.integers(1, 12).flatmap(
    lambda n: arrays("int64", (2, n, 3), elements=st.integers(-3, 3)).map(lambda pair: torch.from_numpy(pair).float())
)
SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40)


@law
@given(st.sets(st.integers(0, 63), min_size=1))
def test_a_query_that_is_its_document_comes_first(steps: set[int]) -> None:
    angles = torch.tensor(sorted(steps), dtype=torch.float64) * (2 * torch.pi / 64)
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)  # unit vectors, all different
    scores = retrieval_scores(vectors, vectors)
    assert scores.mrr == scores.acc_at_1 == 1.0


@law
@given(MATRIX)
def test_ranks_are_those_of_the_definition(pair: torch.Tensor) -> None:
    queries, documents = pair
    for i, found in enumerate(retrieval_scores(queries, documents).reciprocal_ranks):
        scores = [float(queries[i] @ document) for document in documents]
        assert found == 1 / sum(score >= scores[i] for score in scores)


@law
@given(MATRIX, st.randoms(use_true_random=False))
def test_the_order_of_pairs_does_not_matter(pair: torch.Tensor, random: Any) -> None:
    order = list(range(pair.shape[1]))
    random.shuffle(order)
    before = retrieval_scores(*pair).reciprocal_ranks
    assert retrieval_scores(*pair[:, order]).reciprocal_ranks == tuple(before[i] for i in order)


@law
@given(MATRIX, MATRIX)
def test_distractors_never_help(pair: torch.Tensor, more: torch.Tensor) -> None:
    queries, documents = pair
    few = retrieval_scores(queries, documents).reciprocal_ranks
    many = retrieval_scores(queries, torch.cat([documents, more[0]])).reciprocal_ranks
    assert all(after <= before for before, after in zip(few, many, strict=True))


@law
@given(st.integers(1, 20))
def test_a_collapsed_model_scores_as_chance(count: int) -> None:
    scores = retrieval_scores(torch.ones(count, 4), torch.ones(count, 4))
    assert scores.mrr == pytest.approx(1 / count)


def test_retrieval_refuses_what_does_not_fit() -> None:
    with pytest.raises(CalibrationError, match="do not fit"):
        retrieval_scores(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(CalibrationError, match="do not fit"):
        retrieval_scores(torch.ones(2, 4), torch.ones(2, 5))
    with pytest.raises(CalibrationError, match="not finite"):
        retrieval_scores(torch.ones(2, 4), torch.full((2, 4), float("nan")))


@law
@given(SCORES, st.integers(0, 99))
def test_no_difference_to_itself(scores: list[float], seed: int) -> None:
    assert paired_difference(scores, scores, seed) == (0.0, (0.0, 0.0))


@law
@given(SCORES, st.integers(0, 99))
def test_a_difference_is_antisymmetric_and_repeats(scores: list[float], seed: int) -> None:
    other = scores[::-1]
    mean, (low, high) = paired_difference(scores, other, seed, resamples=300)
    back, (back_low, back_high) = paired_difference(other, scores, seed, resamples=300)
    assert paired_difference(scores, other, seed, resamples=300) == (mean, (low, high))
    assert (back, back_low, back_high) == pytest.approx((-mean, -high, -low), abs=1e-12)
    assert low <= high


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        shifted = (torch.randn(100, generator=generator) + 0.3).tolist()
        _, (low, high) = paired_difference(shifted, [0.0] * 100, resamples=400)
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 198


def test_paired_difference_refuses_other_items() -> None:
    with pytest.raises(CalibrationError, match="same items"):
        paired_difference([1.0], [1.0, 0.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_pool_sees_only_what_the_mask_keeps(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    expected = torch.stack([hidden[0].float().mean(0), hidden[1, :2].float().mean(0), torch.zeros(4)])
    hidden[1, 2:] = float("nan")
    pooled = mean_pool(hidden, mask)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-7)


class LetterTokenizer:
    """One token per letter; pads with 0, as a transformers tokenizer would."""

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        ids = [[ord(letter) - 96 for letter in text][:max_length] for text in texts]
        ones = [[1] * len(row) for row in ids]
        return {"input_ids": ids, "token_type_ids": [[0] * len(row) for row in ids], "attention_mask": ones}

    def pad(self, rows: dict[str, list[list[int]]], *, pad_to_multiple_of: int, **_: Any) -> dict[str, Any]:
        width = max(map(len, rows["input_ids"]))
        width += -width % pad_to_multiple_of
        return {name: torch.tensor([v + [0] * (width - len(v)) for v in vs]) for name, vs in rows.items()}


RESULTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "attribute": lambda hidden: SimpleNamespace(last_hidden_state=hidden),
    "mapping": lambda hidden: {"last_hidden_state": hidden},
    "tuple": lambda hidden: (hidden, None),
    "numpy": lambda hidden: [hidden.numpy()],
}
WORDS = st.text("abcdefgh", min_size=1, max_size=12)


@law
@given(
    st.lists(WORDS, min_size=1, max_size=12),
    st.integers(1, 5),
    st.sampled_from([1, 8]),
    st.sampled_from([*RESULTS]),
)
def test_embed_keeps_the_order(texts: list[str], batch_size: int, multiple: int, kind: str) -> None:
    table = torch.randn(27, 6, generator=torch.Generator().manual_seed(0))
    steps: list[tuple[int, int]] = []

    def model(**batch: torch.Tensor) -> Any:
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
        assert batch["input_ids"].shape[1] % multiple == 0
        assert batch["input_ids"].shape[0] <= batch_size
        return RESULTS[kind](table[batch["input_ids"]])

    vectors = embed(
        model,
        LetterTokenizer(),
        texts,
        max_length=8,
        batch_size=batch_size,
        multiple=multiple,
        progress=lambda done, total: steps.append((done, total)),
    )
    means = torch.stack([table[[ord(letter) - 96 for letter in text[:8]]].mean(0) for text in texts])
    torch.testing.assert_close(vectors, means / means.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert steps[-1] == (len(texts), len(texts))
    assert len(steps) == -(-len(texts) // batch_size)


def test_embed_refuses_what_it_cannot_pool() -> None:
    with pytest.raises(CalibrationError, match="last_hidden_state"):
        embed(lambda **_: torch.ones(1, 3), LetterTokenizer(), ["a"])
    with pytest.raises(CalibrationError, match="no texts"):
        embed(lambda **_: torch.ones(1, 3), LetterTokenizer(), [])
