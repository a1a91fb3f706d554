"""What compression costs in answers: MiniLM finds the body of a BBC article from its headline.

    python benchmarks/retrieval.py [--quick] [--points float zeroquant-w8a8 ...] [--again]

All bodies are ranked for every headline, over the first N articles in `load_bbc`'s fixed order, once with the
float model and once with each recipe; static ranges are calibrated on articles past the last N. Difference is
MRR less float's over the same queries, with a 95 % bootstrap interval; cosine is between the same text's vectors
of both models, over all headlines and bodies, its mean and its least.

`w8a8-per-tensor` has one scale a weight and one an activation, and is here to show what granularity buys. Its
activations share one scale over a batch, so it alone depends on which texts share a batch. --quick: N = 200.
"""

from __future__ import annotations

import time
from typing import Any

import timing  # before torch
import torch
from results import Point, Results, command_line
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import dwindle
from dwindle.frontends.assets import load_bbc, load_minilm
from dwindle.frontends.retrieval import RetrievalScores, embed, paired_difference, retrieval_scores

SIZES, QUICK = (500, 1000), (200,)
TOKENS, BATCH = 128, 16
CALIBRATION = 64  # articles, from the other end of the data
TARGET_MRR, TARGET_COSINE = 0.005, 0.997  # for zeroquant-w8a8

PER_TENSOR = {
    "name": "w8a8-per-tensor",
    "quantize": [
        {"weight": {"bits": 8, "granularity": "tensor"}, "activation": {"bits": 8, "granularity": "tensor"}},
        {"operators": ["embedding"], "weight": {"bits": 8, "granularity": "tensor"}},
    ],
}
RECIPES: dict[str, Any] = {
    name: name for name in ("zeroquant-w8a8", "static-w8a8", "w8a16", "w4a16-g128", "w4a8-g32")
} | {"w8a8-per-tensor": PER_TENSOR}
FLOAT = "float"


class Subject:
    """The float model, its texts and its vectors, made when first needed."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes, self.most = sizes, max(sizes)
        self.model, self.tokenizer = load_minilm(quiet=True)
        self.headlines, self.bodies = load_bbc(distinct=True, quiet=True)
        self._float: tuple[Tensor, Tensor] | None = None

    def vectors(self, model: Any) -> tuple[Tensor, Tensor]:
        """(N, D) of headlines and of bodies."""
        chosen = (self.headlines[: self.most], self.bodies[: self.most])
        q, d = (embed(model, self.tokenizer, texts, max_length=TOKENS, batch_size=BATCH) for texts in chosen)
        return q, d

    @property
    def reference(self) -> tuple[Tensor, Tensor]:
        """The float model's vectors."""
        if self._float is None:
            self._float = self.vectors(self.model)
        return self._float

    def calibration(self) -> list[dict[str, Tensor]]:
        """Batches of articles that are not asked about."""
        texts = self.bodies[-CALIBRATION // 2 :] + self.headlines[-CALIBRATION // 2 :]
        assert self.most + CALIBRATION // 2 <= len(self.bodies)
        return [self._encoded(texts[i : i + 8]) for i in range(0, len(texts), 8)]

    def _encoded(self, texts: list[str]) -> dict[str, Tensor]:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        return dict(batch)

    def compressed(self, recipe: Any) -> Any:
        """The model after a recipe, with calibration data for those that ask for it."""
        data = self.calibration()
        return dwindle.compress(self.model, recipe, inputs=data[0], data=data)


def scored(q: Tensor, d: Tensor, reference: tuple[Tensor, Tensor]) -> tuple[RetrievalScores, Point]:
    """Scores of headlines q (N, D) for bodies d (N, D), and all that is told of them: the difference to the float
    model's on the same queries, and cosines to its vectors.
    """
    scores, base = retrieval_scores(q, d), retrieval_scores(*reference)
    difference, interval = paired_difference(scores.reciprocal_ranks, base.reciprocal_ranks)
    cosine = (torch.cat([q, d]) * torch.cat(reference)).sum(1)  # (2 N,)
    return scores, {
        "acc@1": scores.acc_at_1,
        "mrr": scores.mrr,
        "difference": difference,
        "interval": interval,
        "cosine": float(cosine.mean()),
        "least cosine": float(cosine.min()),
    }


def measure(subject: Subject, name: str) -> dict[str, Any]:
    """Scores at every size, differences to float on the same queries, cosine to float's vectors, CPU seconds."""
    reference = subject.reference
    model = subject.model if name == FLOAT else subject.compressed(RECIPES[name])
    started = time.process_time()
    q, d = reference if name == FLOAT else subject.vectors(model)
    found: dict[str, Any] = {"embedding CPU s": time.process_time() - started}
    for size in subject.sizes:
        _, found[str(size)] = scored(q[:size], d[:size], (reference[0][:size], reference[1][:size]))
    return found


def show(points: dict[str, dict[str, Any]], sizes: tuple[int, ...]) -> None:
    """One row a size and recipe."""
    table = Table(title="MiniLM-L6, BBC headline to body", title_justify="left")
    for name in ("N", "model", "acc@1", "MRR", "- float", "95 % interval", "cosine", "least", "target"):
        table.add_column(name, justify="left" if name in ("model", "target") else "right")
    for size in sizes:
        for name, point in points.items():
            r = point[str(size)]
            low, high = r["interval"]
            met = abs(r["difference"]) <= TARGET_MRR and r["cosine"] >= TARGET_COSINE
            compared = [f"{r['difference']:+.4f}", f"{low:+.4f} {high:+.4f}", f"{r['cosine']:.5f}"]
            compared += [f"{r['least cosine']:.4f}"]
            table.add_row(
                *(str(size), name, f"{r['acc@1']:.3f}", f"{r['mrr']:.4f}"),
                *(compared if name != FLOAT else [""] * 4),
                ("met" if met else "missed") if name == "zeroquant-w8a8" else "",
            )
        table.add_section()
    table.caption = f"Target of zeroquant-w8a8: MRR within {TARGET_MRR} of float's, mean cosine >= {TARGET_COSINE}"
    Console(width=110).print(table)


def main() -> None:
    """Measure the recipes that are not there yet, and print all."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--points", nargs="+", choices=[FLOAT, *RECIPES], default=[FLOAT, *RECIPES])
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    sizes = QUICK if arguments.quick else SIZES
    subject, results = Subject(sizes), Results("retrieval", again=arguments.again)
    points = {}
    for name in track(arguments.points, "Embedding", console=Console(stderr=True), transient=True):
        recipe = RECIPES.get(name)
        configuration = {"recipe": recipe, "sizes": sizes, "tokens": TOKENS, "calibration": CALIBRATION}
        points[name] = results.point(configuration, lambda name=name: measure(subject, name))
    show(points, sizes)


if __name__ == "__main__":
    main()
