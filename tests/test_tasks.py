"""The training tasks: what their files hold, what their scores mean, and that training repeats itself."""

from __future__ import annotations

import importlib
import math
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fetching import fetched_or_skip
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dwindle
from dwindle.frontends import assets
from dwindle.frontends.assets import AssetError, Package, fetch
from dwindle.frontends.sentiment import (
    SentimentTask,
    evaluate_sentiment,
    load_classifier,
    load_sentiment,
    parse_sentences,
    score_margins,
    sentiment_task,
)
from dwindle.runtime.errors import CalibrationError


def benchmark(name: str) -> ModuleType:
    """A module of benchmarks/, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        return importlib.import_module(name)


language, training = benchmark("language"), benchmark("training")

TABLE = ["1\t2.25\tA joy.", "2\t-0.5\tDull, but short.", "3\t0.45\tA film.", "4\t-3.1\t Awful. ", "5\t0.5\tFine."]


# Sentences


@given(st.permutations(TABLE))
def test_sentences_keep_their_order_whatever_the_order_of_lines(lines: list[str]) -> None:
    sentences = parse_sentences("\r\n".join(lines), required=5)
    assert sentences == parse_sentences("\n".join(TABLE))
    rows = set(zip(sentences.texts, sentences.labels, sentences.scores, strict=True))
    assert rows == {("A joy.", 1, 2.25), ("Dull, but short.", 0, -0.5), ("Awful.", 0, -3.1), ("Fine.", 1, 0.5)}


@pytest.mark.parametrize("line", ["6\t1.0", "6\tgood\tA text.", "6\t4.5\tA text.", "6\tnan\tA text.", "6\t1\ta\tb"])
def test_a_line_that_is_no_sentence_is_named(line: str) -> None:
    with pytest.raises(AssetError, match="line 6"):
        parse_sentences("\n".join([*TABLE, line]))


def test_missing_lines_are_counted() -> None:
    with pytest.raises(AssetError, match="required: 6 lines"):
        parse_sentences("\n".join(TABLE), required=6)


# Scores


@given(st.lists(st.integers(-40, 40).filter(bool), min_size=2, max_size=20, unique=True))
def test_margins_that_are_the_scores_are_perfect(values: list[int]) -> None:
    scores = torch.tensor(values) / 10
    result = score_margins(3 * scores + 0.01, (scores > 0).long(), scores)
    assert result.accuracy == 1.0
    assert result.correlation == pytest.approx(1.0)
    assert score_margins(-scores, (scores > 0).long(), scores).accuracy == 0.0
    assert score_margins(-scores, (scores > 0).long(), scores).correlation == pytest.approx(-1.0)


def test_a_model_that_says_one_thing_has_no_correlation() -> None:
    result = score_margins(torch.zeros(4), torch.tensor([0, 1, 0, 0]), torch.tensor([-1.0, 1.0, -2.0, -1.0]))
    assert (result.accuracy, result.correlation, result.predictions) == (0.75, 0.0, (0, 0, 0, 0))
    with pytest.raises(CalibrationError, match="not finite"):
        score_margins(torch.tensor([0.0, math.nan]), torch.tensor([0, 1]), torch.tensor([-1.0, 1.0]))


def test_every_test_sentence_is_asked_once_and_in_eval_mode() -> None:
    ids = torch.arange(1, 101).reshape(100, 1)
    labels = (ids[:, 0] % 3 == 0).long()
    task = SentimentTask({}, {"input_ids": ids, "attention_mask": ids, "labels": labels}, labels.double(), None)

    class Oracle(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            assert not self.training
            assert not torch.is_grad_enabled()
            right = (input_ids[:, 0] % 3 == 0).float()
            return SimpleNamespace(logits=torch.stack([0.5 - right, right - 0.5], dim=1))

    model = Oracle().train()
    result = evaluate_sentiment(model, task)
    assert model.training
    assert result.accuracy == 1.0
    assert result.predictions == tuple(labels.tolist())


@pytest.mark.slow
def test_the_classifier_is_captured_for_any_batch_and_length() -> None:
    fetched_or_skip(assets.SENTIMENT, assets.MINILM)
    model, task = load_classifier(), sentiment_task()
    batch = {name: values[:8] for name, values in task.train.items()}
    student = dwindle.prepare(model, {}, inputs=batch)
    for rows, tokens in ((8, 48), (3, 31)):
        part = {name: values[:rows, :tokens] if values.dim() > 1 else values[:rows] for name, values in batch.items()}
        with torch.no_grad():
            wanted, found = model(**part), student(**part)
        torch.testing.assert_close(found.logits, wanted.logits)
        torch.testing.assert_close(found.loss, wanted.loss)
    assert student(**{name: batch[name] for name in ("input_ids", "attention_mask")}).get("loss") is None


# Novels


def in_r(strings: list[str], *, kind: int = 16, missing: bool = False) -> bytes:
    """A character vector as R's `saveRDS(version = 3)` writes it, uncompressed."""
    data = (
        b"X\n" + struct.pack(">IIII", 3, 0x00040201, 0x00030500, 5) + b"UTF-8" + struct.pack(">II", kind, len(strings))
    )
    for text in (part.encode() for part in strings):
        data += struct.pack(">Ii", 0x00040009, -1 if missing else len(text)) + (b"" if missing else text)
    return data


def database(*objects: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(data)) + zlib.compress(data) for data in objects)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=8))
def test_strings_are_read_as_r_wrote_them(strings: list[str]) -> None:
    assert language.read_strings(in_r(strings)) == strings


def test_novels_are_read_in_the_order_of_their_names() -> None:
    texts = {name: f"{name}\n\nChapter 1 — £1" for name in language.NOVELS}
    assert language.read_novels(database(*(in_r(text.split("\n")) for text in texts.values()))) == texts


GOOD = in_r(["EMMA", "", "by Jane Austen"])


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (database(GOOD), "novels are missing"),
        (database(*[GOOD] * 6)[:-4], "cut short"),
        (b"\0\0\0\1nothing", "cannot be read"),
        (database(GOOD[:-3]), "another length"),
        (database(GOOD + b"\0"), "another length"),
        (database(in_r(["a"], kind=13)), "required: a character vector"),
        (database(in_r(["a"], missing=True)), "required: a string"),
    ],
    ids=["one", "cut", "no-zlib", "short", "long", "integers", "missing-value"],
)
def test_another_database_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(AssetError, match=complaint):
        language.read_novels(data)


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (2, 4), (3, 10)])
def test_rotating_neighbours_is_rotating_halves_of_evens_first(heads: int, width: int) -> None:
    x, angles = torch.randn(heads * width, 1), torch.rand(width // 2, 1)
    cos, sin = angles.cos(), angles.sin()
    pairs = x.reshape(heads, -1, 2, 1)
    a, b = pairs[:, :, 0], pairs[:, :, 1]  # (H, d/2, 1)
    glass = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=2).reshape(-1, 1)
    first, second = language.evens_first(x, heads).reshape(heads, 2, -1, 1).unbind(1)
    llama = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1).reshape(-1, 1)
    torch.testing.assert_close(llama, language.evens_first(glass, heads))


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    def model(input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    result = language.evaluate_language(model, torch.arange(40 * 128 + 5) % 50)
    assert len(result.losses) == 40
    assert result.perplexity == pytest.approx(50)
    with pytest.raises(CalibrationError, match="too few"):
        language.evaluate_language(model, torch.arange(127))


# Training


class Regression(nn.Module):
    """With dropout, so that two runs agree only under one seed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.hidden, self.out, self.dropout = nn.Linear(4, 16), nn.Linear(16, 1), nn.Dropout(0.2)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        found = self.out(self.dropout(self.hidden(x).tanh())) * self.frozen
        return SimpleNamespace(loss=nn.functional.mse_loss(found, y))


X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
DATA = {"x": X, "y": X.sum(dim=1, keepdim=True)}


def trained(seed: int, **options: Any) -> tuple[Regression, list[float]]:
    model = Regression().eval()
    batches = training.shuffled(DATA, seed=seed, size=8)
    return model, training.train(model, batches, **{"steps": 60, "lr": 1e-2, "seed": seed, **options})


def test_training_repeats_itself_and_learns() -> None:
    seen: list[tuple[int, float]] = []
    model, losses = trained(0, after_step=lambda step, loss: seen.append((step, loss)))
    torch.rand(3)  # another state of torch's generator
    again, repeated = trained(0)
    assert losses == repeated
    assert seen == list(enumerate(losses, 1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert sum(losses[-10:]) < sum(losses[:10]) / 3
    assert trained(1)[1] != losses
    assert not model.training
    assert model.frozen.item() == 1.0


def test_training_says_what_stopped_it() -> None:
    with pytest.raises(CalibrationError, match="required: 60 batches"):
        training.train(Regression(), [DATA, DATA], steps=60, lr=1e-2)
    with pytest.raises(CalibrationError, match="nan at step 1"):
        training.train(Regression(), [DATA | {"y": DATA["y"] * math.nan}], steps=1, lr=1e-2)


def test_an_epoch_has_every_row_at_most_once() -> None:
    batches = training.shuffled({"row": torch.arange(10)}, seed=3, size=3)
    epochs = [torch.cat([next(batches)["row"] for _ in range(3)]).tolist() for _ in range(4)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    with pytest.raises(CalibrationError, match="too few rows"):
        next(training.shuffled({"row": torch.arange(2)}, seed=0, size=3))


def test_random_windows_are_parts_of_the_text() -> None:
    batch = next(training.random_windows(torch.arange(200), seed=0, size=5))
    assert batch["input_ids"].shape == (5, 128)
    assert torch.equal(batch["input_ids"], batch["input_ids"][:, :1] + torch.arange(128))


# Debian's packages

TOY = Package(name="toy-text", version="1.0-1", form="deb", key="usr/share/toy/text")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb to make a package with")
def test_a_debian_package_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "toy"
    (source / "DEBIAN").mkdir(parents=True)
    control = (
        "Package: toy-text\nVersion: 1.0-1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: toy\n"
    )
    (source / "DEBIAN" / "control").write_text(control)
    (source / TOY.key).parent.mkdir(parents=True)
    (source / TOY.key).write_text("once upon a time")
    subprocess.run(["dpkg-deb", "--build", source, tmp_path / "toy.deb"], check=True, capture_output=True)
    monkeypatch.setenv("DWINDLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_download", lambda package, work: shutil.copy(tmp_path / "toy.deb", work / "toy.deb"))
    assert (fetch(TOY, quiet=True) / TOY.key).read_text() == "once upon a time"
    (tmp_path / "toy.deb").write_bytes(b"no package")
    with pytest.raises(AssetError, match="cannot be unpacked"):
        fetch(replace(TOY, version="2.0-1"), quiet=True)


def test_a_system_without_apt_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DWINDLE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssetError, match="cannot be downloaded") as raised:
        fetch(TOY, quiet=True)
    assert raised.value.found == "no apt-get and no dpkg in PATH"
    assert "toy-text-1.0-1/" in (raised.value.cure or "")
    assert list(tmp_path.iterdir()) == []


def test_what_apt_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("apt-get", "dpkg"):
        (tools / name).write_text("#!/bin/sh\necho 'W: a warning' >&2\necho \"E: no package $3\" >&2\nexit 100\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("DWINDLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    with pytest.raises(AssetError, match="cannot be downloaded") as raised:
        fetch(TOY, quiet=True)
    assert raised.value.found == "no package toy-text=1.0-1"
    assert "apt-get update" in (raised.value.cure or "")


# The real ones


@pytest.mark.slow
def test_the_sentences_are_those_that_were_measured() -> None:
    fetched_or_skip(assets.SENTIMENT)
    train, test = load_sentiment()
    assert (len(train.texts), len(test.texts)) == (8000, 2072)
    assert set(train.texts).isdisjoint(test.texts)
    assert sum(test.labels) == 1035
    assert all(
        (score > 0) == label and 0.5 <= abs(score) <= 4 for label, score in zip(test.labels, test.scores, strict=True)
    )
    assert not any("\t" in text or text != text.strip() for text in train.texts + test.texts)


@pytest.mark.slow
def test_a_new_head_is_the_seeds_and_at_chance() -> None:
    fetched_or_skip(assets.SENTIMENT, assets.MINILM)
    task = sentiment_task()
    assert sentiment_task() is task
    assert task.train["input_ids"].shape == (8000, 48)
    model, other = load_classifier(seed=1), load_classifier(seed=2)
    assert torch.equal(model.classifier.weight, load_classifier(seed=1).classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 10_795_394
    few = {name: values[:148] for name, values in task.test.items()}
    result = evaluate_sentiment(model, replace(task, test=few, scores=task.scores[:148]))
    assert 0.35 < result.accuracy < 0.65


@pytest.mark.slow
def test_llama_computes_what_glassllm_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched_or_skip(assets.GLASSLLM, assets.AUSTEN)
    model, tokenizer = language.load_glass()
    assert sum(p.numel() for p in model.parameters()) == 852_608
    novels = language.read_novels((fetch(assets.AUSTEN) / assets.AUSTEN.key).read_bytes())
    assert sum(map(len, novels.values())) == 4_025_022
    text = novels["persuasion"][:20_000]
    with monkeypatch.context() as patch:  # the wheel's own NumPy code, run here alone
        patch.syspath_prepend(str(fetch(assets.GLASSLLM)))
        glass, own = importlib.import_module("glassllm").load_pretrained("en")
        assert tokenizer.encode(text).ids == own.encode(text)
        ids = np.array(own.encode(text)[:512]).reshape(4, 128)
        wanted = torch.from_numpy(glass(ids).data).float()
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(ids)).logits
    assert (found - wanted).abs().max() < 1e-4  # 1.4e-5 was measured, logits up to 16


@pytest.mark.slow
def test_a_carroll_reader_finds_austen_hard() -> None:
    fetched_or_skip(assets.GLASSLLM, assets.AUSTEN)
    model, tokenizer = language.load_glass()
    train, test = language.load_austen(tokenizer)
    assert (len(train), len(test)) == (1_342_451, 176_868)
    assert language.evaluate_language(model, test).perplexity == pytest.approx(106.77, abs=0.02)
