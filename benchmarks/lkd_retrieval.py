"""What layer-by-layer distillation gives back of what rounding loses: MiniLM finds an article by its headline.

    python benchmarks/lkd_retrieval.py [--recipes w4-groups48 ...] [--seeds 0 1 2] [--quick] [--again]
    python benchmarks/lkd_retrieval.py --rates 5e-6 5e-5 2e-4 5e-4      # on texts, the first seed alone

Feed-forward weights of 4 or 3 bits, all other weights and all activations of 8 (ZeroQuant's W4/8A8). Each recipe is
rounded to nearest (PTQ), and distilled: on texts of articles that are not asked about, and on random tokens. The seed
chooses the texts or tokens and their order. Differences are of MRR over the same queries, an item's score its mean over
the seeds, with 95 % bootstrap intervals; `given back` is the share of PTQ's loss that is gone.

CPU seconds are those of `distill_layers`, on one thread: the teacher's run among them. --quick: 200 articles, 10 steps.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import timing  # before torch
import torch
from results import Point, Results, command_line
from retrieval import BATCH, FLOAT, Subject, scored
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dwindle
from dwindle.frontends.layerwise import random_tokens
from dwindle.frontends.recipe import FEED_FORWARD
from dwindle.frontends.retrieval import paired_difference

SIZE, QUICK = 1500, 200
TOKENS = 64  # of a text that is learned from
ARTICLES, TEXTS = 160, 8  # learned from, drawn of those past the last that is asked about; texts a batch
TRAINING = {"steps": 75, "lr": 2e-4}
TARGET_SECONDS, TARGET_SHARE = 60, 0.5

ACTIVATION = {"bits": 8}
FFN: dict[str, dict[str, int]] = {
    "w4-groups48": {"bits": 4, "groups": 48},  # DeepSpeed's: scales of a whole weight
    "w3-channel": {"bits": 3},
}
DATA = ("texts", "random tokens")


def recipe(ffn: dict[str, int]) -> dict[str, Any]:
    """Everything at 8 bits but the feed-forward weights."""
    return {
        "quantize": [
            {"weight": {"bits": 8}, "activation": ACTIVATION},
            {"patterns": [FEED_FORWARD], "weight": ffn, "activation": ACTIVATION},
            {"operators": ["embedding"], "weight": {"bits": 8}},
        ]
    }


def texts(subject: Subject, seed: int) -> list[dict[str, Tensor]]:
    """Batches of bodies, and a third as many of headlines; texts of a batch are of like length."""
    rest = range(subject.most, len(subject.bodies))
    chosen = np.random.default_rng(seed).choice(rest, ARTICLES, replace=False).tolist()
    batches = []
    for held, of in ((subject.bodies, chosen[: ARTICLES * 3 // 4]), (subject.headlines, chosen[ARTICLES * 3 // 4 :])):
        ordered = sorted((held[i] for i in of), key=len)
        for i in range(0, len(ordered), TEXTS):
            batch = ordered[i : i + TEXTS]
            tokens = subject.tokenizer(batch, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
            batches.append(dict(tokens))
    return batches


def ranks(subject: Subject, vectors: tuple[Tensor, Tensor]) -> Point:
    """MRR, the rank of each query's article, and the mean cosine to the float model's vectors."""
    scores, found = scored(*vectors, subject.reference)
    shown = " ".join(str(round(1 / r)) for r in scores.reciprocal_ranks)
    return {"mrr": found["mrr"], "cosine": found["cosine"], "ranks": shown}


def rounded(subject: Subject, ffn: dict[str, int]) -> Point:
    """Without training."""
    small = dwindle.compress(subject.model, recipe(ffn), inputs=subject.calibration()[0])
    return ranks(subject, subject.vectors(small))


def distilled(subject: Subject, ffn: dict[str, int], data: str, seed: int, training: dict[str, Any]) -> Point:
    """With each block trained by itself."""
    batches = texts(subject, seed)
    if data != DATA[0]:
        whole = max(batches, key=lambda batch: batch["input_ids"].shape[1])
        example = whole | {"attention_mask": torch.ones_like(whole["attention_mask"])}
        batches = random_tokens(subject.model, example, batches=len(batches), seed=seed)
    student = dwindle.prepare(subject.model, recipe(ffn), inputs=batches[0], teacher=subject.model)
    started = time.process_time()
    found = student.distill_layers(batches, **training, seed=seed, quiet=True)
    spent = time.process_time() - started
    errors = [[layer.before, layer.after] for layer in found.layers]
    return {"CPU s": spent, "errors": errors, **ranks(subject, subject.vectors(student.finish()))}


def reciprocal(points: Sequence[Point]) -> list[float]:
    """1 / rank of each query, its mean over the seeds."""
    every = [[1 / int(rank) for rank in point["ranks"].split()] for point in points]
    mean: list[float] = np.mean(every, axis=0).tolist()
    return mean


def share(loss: Sequence[float], left: Sequence[float], resamples: int = 2000) -> tuple[float, tuple[float, float]]:
    """1 - mean(left) / mean(loss) over the same items, and its 95 % bootstrap interval."""
    both = np.array([loss, left])  # (2, N)
    generator = np.random.default_rng(0)
    picks = (generator.integers(both.shape[1], size=both.shape[1]) for _ in range(resamples))
    means = np.array([both[:, pick].mean(axis=1) for pick in picks])  # (resamples, 2)
    low, high = np.quantile(1 - means[:, 1] / means[:, 0], (0.025, 0.975))
    return 1 - both[1].mean() / both[0].mean(), (float(low), float(high))


def show(float_point: Point, rows: dict[str, tuple[Point, dict[str, list[Point]]]]) -> None:
    """A row for each recipe's PTQ, and for each kind of data."""
    console, base = Console(width=150), reciprocal([float_point])
    table = Table(title=f"MiniLM-L6, {len(base)} headlines; float MRR {float_point['mrr']:.4f}", title_justify="left")
    for name in ("FFN", "trained on", "MRR", "less float's", "less PTQ's", "given back", "cosine", "CPU s"):
        table.add_column(name)
    for name, (ptq, kinds) in rows.items():
        plain = reciprocal([ptq])
        table.add_row(name, "-", f"{ptq['mrr']:.4f}", apart(plain, base), "", "", f"{ptq['cosine']:.4f}", "")
        for data, points in kinds.items():
            own = reciprocal(points)
            lost, left = (np.array(base) - np.array(scores) for scores in (plain, own))
            gone, (low, high) = share(lost.tolist(), left.tolist())
            table.add_row(
                *("", data, " ".join(f"{p['mrr']:.4f}" for p in points), apart(own, base), apart(own, plain)),
                f"{gone:.0%} ({low:.0%} to {high:.0%})",
                " ".join(f"{p['cosine']:.4f}" for p in points),
                " ".join(f"{p['CPU s']:.0f}" for p in points),
            )
        table.add_section()
    table.caption = (
        f"Target: {TARGET_SHARE:.0%} given back in {TARGET_SECONDS} CPU s on texts; above PTQ on random tokens"
    )
    console.print(table)


def show_rates(name: str, points: dict[float, Point]) -> None:
    """What each learning rate leaves of the blocks' errors on the texts that they learn from, and the MRR after it."""
    table = Table(title=f"{name}, on texts, {TRAINING['steps']} steps", title_justify="left")
    for heading in ("learning rate", "error left, mean over blocks", "MRR", "cosine"):
        table.add_column(heading)
    for lr, p in points.items():
        left = np.mean([after / before for before, after in p["errors"]])
        table.add_row(f"{lr:g}", f"{left:.2f}", f"{p['mrr']:.4f}", f"{p['cosine']:.4f}")
    Console(width=150).print(table)


def apart(scores: Sequence[float], others: Sequence[float]) -> str:
    """The paired difference and its interval."""
    mean, (low, high) = paired_difference(scores, others)
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"


def main() -> None:
    """Measure what is not there yet, and print the table."""
    parser = command_line(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=FFN, default=list(FFN))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to compare, in place of the table")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    size = QUICK if arguments.quick else SIZE
    if arguments.quick:
        TRAINING["steps"] = 10
    subject, results = functools.cache(lambda: Subject((size,))), Results("lkd_retrieval", again=arguments.again)
    common = {"size": size, "batch": BATCH}

    def point(more: dict[str, Any], measure: Any) -> Point:
        with Console(stderr=True).status(" ".join(map(str, more.values()))):
            return results.point(common | more, measure)

    base = point({"recipe": FLOAT}, lambda: ranks(subject(), subject().reference))

    def learned(ffn: dict[str, int], data: str, seed: int, training: dict[str, Any]) -> Point:
        more = {"recipe": recipe(ffn), "data": data, "seed": seed, **training}
        more |= {"articles": ARTICLES, "texts": TEXTS, "tokens": TOKENS}
        return point(more, lambda: distilled(subject(), ffn, data, seed, training))

    if arguments.rates:
        for name in arguments.recipes:
            found = {
                lr: learned(FFN[name], "texts", arguments.seeds[0], TRAINING | {"lr": lr}) for lr in arguments.rates
            }
            show_rates(name, found)
        return
    rows = {}
    for name in arguments.recipes:
        ffn = FFN[name]
        ptq = point({"recipe": recipe(ffn)}, lambda ffn=ffn: rounded(subject(), ffn))
        kinds: dict[str, list[Point]] = {}
        for data in DATA:
            for seed in arguments.seeds:
                kinds.setdefault(data, []).append(learned(ffn, data, seed, TRAINING))
        rows[name] = ptq, kinds
    show(base, rows)


if __name__ == "__main__":
    main()
