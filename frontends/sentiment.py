"""Sentiment of film reviews: the task on which training, quantised or pruned, is tried out.

    y_i = [score_i > 0]           score_i: mean of 20 raters, in [-4, 4], |score_i| >= .5
    m_i = logit_i1 - logit_i0     accuracy = mean_i [(m_i > 0) = y_i]     correlation = Pearson(m, score)

Sentences: Hutto and Gilbert, "VADER" (ICWSM 2014), 10,072 of 10,605. Their order is by the hash of the text, so
it is nobody's choice, the same everywhere, and has no sentence on both sides of the split; the first 8,000 train.
Judge by paired differences on the same test items (`retrieval.paired_difference`); one accuracy has a standard
error of .8 point. The correlation sees changes that turn no sentence's sign.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import CalibrationError, MissingDependencyError
from .assets import SENTIMENT, AssetError, fetch, load_minilm
from .modes import evaluating

TRAIN, TEST = 8000, 2072  # sentences
LENGTH = 48  # tokens; 3.8 % of the sentences are cut
LEAST_SCORE = 0.5
EVALUATION_BATCH = 74  # divides TEST: every batch has one shape

_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_LINES = 10605


@dataclass(frozen=True)
class Sentences:
    """Texts with `labels` (1 is positive) and the raters' mean `scores`; the three are of one length."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class SentimentResult:
    """What a model said of each test sentence: `margins[i]` = logit 1 - logit 0, `correct[i]` in {0., 1.}."""

    margins: tuple[float, ...]
    correct: tuple[float, ...]
    correlation: float

    @property
    def predictions(self) -> tuple[int, ...]:
        """1 where the model takes the sentence for positive; a tie is negative."""
        return tuple(int(margin > 0) for margin in self.margins)

    @property
    def accuracy(self) -> float:
        """The share of sentences whose sign is right."""
        return sum(self.correct) / len(self.correct)

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.3f}, correlation {self.correlation:.3f} ({len(self.correct)} sentences)"


def load_sentiment(*, quiet: bool = False) -> tuple[Sentences, Sentences]:
    """(train, test): 8,000 and 2,072 sentences, always the same, in a mixed order. Raises AssetError."""
    with tarfile.open(fetch(SENTIMENT, quiet=quiet) / SENTIMENT.key) as archive:
        member = archive.extractfile(_MEMBER)
        assert member is not None  # the archive is pinned
        sentences = parse_sentences(member.read().decode("utf-8"), required=_LINES)
    found = len(sentences.texts)
    if found != TRAIN + TEST:
        raise AssetError("sentences are missing", required=TRAIN + TEST, found=found)
    return _part(sentences, slice(TRAIN)), _part(sentences, slice(TRAIN, None))


def _part(sentences: Sentences, rows: slice) -> Sentences:
    return Sentences(sentences.texts[rows], sentences.labels[rows], sentences.scores[rows])


def parse_sentences(table: str, *, required: int | None = None) -> Sentences:
    """The sentences of a table "id TAB score TAB text" with |score| >= .5, ordered by the hash of their text.

    required: how many lines there must be. Raises AssetError.
    """
    rows = [line.split("\t") for line in table.splitlines() if line.strip()]
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 3 or not _is_score(row[1])), None)
    if wrong is not None or (required is not None and len(rows) != required):
        raise AssetError(
            "the table of rated sentences cannot be read",
            required=f"{'lines' if required is None else f'{required:,} lines'} of an id, a score and a text",
            found=f"{len(rows):,} lines" if wrong is None else f"line {wrong}: {rows[wrong - 1]}",
        )
    pairs = [(text.strip(), float(score)) for _, score, text in rows if abs(float(score)) >= LEAST_SCORE]
    pairs.sort(key=lambda pair: (hashlib.sha256(pair[0].encode()).hexdigest(), pair[1]))
    texts, scores = tuple(text for text, _ in pairs), tuple(score for _, score in pairs)
    return Sentences(texts, tuple(int(score > 0) for score in scores), scores)


def _is_score(text: str) -> bool:
    try:
        return -4 <= float(text) <= 4
    except ValueError:
        return False


@dataclass(frozen=True)
class SentimentTask:
    """Both sides of the split as tensors: input_ids and attention_mask (N, 48) int64, labels (N,) int64.

    scores: (2072,) fp64, the raters' for the test sentences. tokenizer: MiniLM's.
    """

    train: dict[str, Tensor]
    test: dict[str, Tensor]
    scores: Tensor
    tokenizer: Any


@functools.cache
def sentiment_task() -> SentimentTask:
    """The task, tokenised once a process; its tensors are shared, so change none. Takes 4 CPU s and 8 MB."""
    (train, test), (_, tokenizer) = load_sentiment(), load_minilm()
    return SentimentTask(
        _encoded(tokenizer, train), _encoded(tokenizer, test), torch.tensor(test.scores).double(), tokenizer
    )


def _encoded(tokenizer: Any, sentences: Sentences) -> dict[str, Tensor]:
    whole = tokenizer(
        list(sentences.texts), truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt"
    )
    return {
        "input_ids": whole["input_ids"],
        "attention_mask": whole["attention_mask"],
        "labels": torch.tensor(sentences.labels),
    }


def load_classifier(*, seed: int = 0, quiet: bool = False) -> nn.Module:
    """MiniLM as a `BertForSequenceClassification`, in eval mode; `seed` decides its head, so it is at chance.

    The head is dropout and a linear layer on the pooler, which is MiniLM's own. Trained on one epoch, it is as good as
    one on the mean of the tokens (accuracy .840 and .842 on the same items). The embeddings, half of the parameters,
    are frozen.
    """
    try:
        from transformers import BertForSequenceClassification
    except ImportError as error:
        raise MissingDependencyError("transformers", "hf", "the sentiment classifier") from error
    encoder, _ = load_minilm(quiet=quiet)
    config: Any = copy.deepcopy(encoder.config)
    config.num_labels, config.problem_type = 2, "single_label_classification"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = BertForSequenceClassification(config)
    model.bert = encoder
    encoder.get_submodule("embeddings").requires_grad_(False)
    return model.eval()


def evaluate_sentiment(model: Callable[..., Any], task: SentimentTask | None = None) -> SentimentResult:
    """What `model` says of the test sentences, in batches of (74, 48), called without labels and gradients.

    A module is put in eval mode and back; the model's device is `model.device` where it has one. Raises
    CalibrationError when a logit is not finite.
    """
    task = task or sentiment_task()
    device, margins = getattr(model, "device", "cpu"), []
    inputs = [torch.split(task.test[name], EVALUATION_BATCH) for name in ("input_ids", "attention_mask")]
    with evaluating(model):
        for ids, mask in zip(*inputs, strict=True):
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits  # (74, 2)
            margins.append((logits[:, 1] - logits[:, 0]).double().cpu())
    return score_margins(torch.cat(margins), task.test["labels"], task.scores)


def score_margins(margins: Tensor, labels: Tensor, scores: Tensor) -> SentimentResult:
    """The result of logit margins (N,) against labels (N,) in {0, 1} and scores (N,).

    Pearson's correlation is 0 where margins or scores are constant.
    """
    if not margins.isfinite().all():
        raise CalibrationError("a logit is not finite", required="finite logits", found="NaN or infinity")
    x, y = (v.double() - v.double().mean() for v in (margins, scores))
    scale = float(x.norm() * y.norm())
    correct = (margins > 0).long() == labels
    return SentimentResult(
        tuple(margins.tolist()), tuple(correct.double().tolist()), float(x @ y) / scale if scale else 0.0
    )
