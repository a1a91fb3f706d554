"""The report's page: complete, safe, alone, the same each time. And the report's tables at any width."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from dwindle.frontends.charts import Bar, bar_chart, curve_chart, scale
from dwindle.frontends.page import page, write_page
from dwindle.runtime.certificate import Certificate, Layer
from dwindle.runtime.errors import DwindleError
from dwindle.runtime.program import Entry
from dwindle.runtime.report import Report, block_of, size, spoken

NASTY = "head.<script>alert('x')</script>&\"[bold]"
VOID = {"meta", "br", "input"}


def layer(name: str, error: float | None = 0.01, **more: object) -> Layer:
    facts = {"operator": "qlinear", "scheme": "8-symmetric-channel-nearest", "kernel": "cpu int8 gemm"}
    return Layer(**{"name": name, "bytes_before": 4000, "bytes_after": 1100, "error": error, **facts, **more})


def report(depth: int = 2, *, extra: tuple[Layer, ...] = (), measured: bool = True) -> Report:
    layers = [layer(f"encoder.{i}.dense.weight", 0.01 * (i + 1)) for i in range(depth)]
    layers += [layer("norm.bias", None, scheme="float32", operator="", kernel="", bytes_after=4000)]
    certificate = Certificate(
        layers=(*layers, *extra),
        simulated=0,
        graph_breaks=0,
        lowering_error=1e-7,
        output_error={"largest": 0.1, "relative": 0.02, "sqnr": 34.0, "cosine": 0.9998},
        inputs="input_ids [2, 8]",
        torch="2.13.0",
    )
    log = (
        Entry(stage="decide", rule="decide.quantize", where="head", applied=False, reason="shared <with> b"),
        Entry(stage="decide", rule="decide.quantize", where="tail", applied=False, reason="shared <with> b"),
        Entry(stage="lower", rule="lower.qlinear", where="encoder.0"),
    )
    row = {"batch": 1, "eager_p50": 0.02, "eager_p95": 0.03, "p50": 0.01, "p95": 0.015}
    figures = {"latency": [row], "machine": "a machine"} if measured else {}
    return Report(certificate, {"name": "zeroquant-w8a8"}, log, figures)


class Reader(HTMLParser):
    """Tags in order, checked to nest; the text between them; what is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_every_layer_and_log_entry_is_there() -> None:
    facts = report(120)
    words = "\n".join(Reader(page(facts)).words)
    for item in facts.certificate.layers:
        assert f"\n{item.name}\n" in words
    for expected in ("shared <with> b", "lower.qlinear", "cpu int8 gemm", "zeroquant-w8a8", "a machine", "2.13.0"):
        assert expected in words
    assert page(facts).count('class="bar"') == 120


def test_names_are_escaped() -> None:
    text = page(report(extra=(layer(NASTY, declined=("<b>no</b>",)),)), title="<i>model</i>")
    assert NASTY not in text
    assert NASTY in unescape(text)
    assert Reader(text).tags.count("script") == 1
    assert "<i>model</i>" not in text
    assert "<b>no</b>" not in text


def test_nothing_is_fetched() -> None:
    text = page(report())
    assert Reader(text).fetched == []
    assert re.search(r"https?:|//\w|@import|url\(|fetch\(", text) is None


def test_same_report_same_bytes(tmp_path: Path) -> None:
    one, two = write_page(report(), tmp_path / "a.html"), write_page(report(), tmp_path / "b.html")
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


TRAINING = {
    "steps": 40,
    "bits": [8.0, 4.5],
    "curve": [(10, 1.5, 8.0), (20, None, 6.0), (30, 0.5, 6.0), (40, 0.25, 4.5)],
    "changes": [(12, 32, 6, 2, "activation"), (33, 6, 4, 1, "weight")],
    "curvature": {"cost": "12 products in 3 s", "blocks": {NASTY: [0.25, 3]}},
}


def trained(**more: object) -> Report:
    facts = report()
    return Report(facts.certificate, facts.recipe, facts.log, {**facts.measured, "training": TRAINING | more})


def test_training_is_drawn_and_told() -> None:
    text = page(trained())
    words = "\n".join(Reader(text).words)
    assert "40 steps, 8 -> 4.5 bits on average; loss 1.5 -> 0.25; curvature 12 products in 3 s" in words
    assert text.count('class="curve"') == 2  # bits and loss
    assert text.count('class="mark" d=') == 4  # each change in both
    assert "step 33: 6 bits to 4 bits, 1 weight" in words
    assert "float to 6 bits, 2 activations" in words
    assert NASTY not in text
    assert NASTY in unescape(text)
    assert "Training" not in Reader(page(report())).words
    assert "training" in str(trained())
    assert "loss" not in page(trained(curve=[(40, None, 4.5)])).partition("<section>")[2].partition("</section>")[0]


def test_a_curve_has_gaps_and_goes_below_zero() -> None:
    text = curve_chart([(0, 1.0), (1, None), (2, 3.0), (3, -2.0)], end=3, label="loss")
    (path,) = re.findall(r'class="curve" d="([^"]*)"', text)
    assert (path.count("M"), path.count("L")) == (2, 1)
    levels = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert levels[1] < levels[0] < levels[2] <= 148  # the picture's lower edge is below
    assert "H" in curve_chart([(0, 1.0), (2, 3.0)], end=3, label="bits", stairs=True)
    assert 'd=""' in curve_chart([], end=0, label="none")


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(DwindleError, match="something that is there"):
        write_page(report(), path)
    assert path.read_text() == "mine"


def test_a_model_that_nothing_was_done_to() -> None:
    text = page(Report(report(0).certificate, {}, (), {}))
    for said in ("No layer was quantised", "Not measured", "Nothing was declined", "Nothing runs on dwindle"):
        assert said in text.replace("&#x27;", "'")


@pytest.mark.parametrize(
    ("values", "top"), [([], 1.0), ([0.0], 1.0), ([0.278], 0.3), ([1.0], 1.0), ([3e-7, 1e-7], 3e-7), ([1234.0], 1250.0)]
)
def test_scale_is_round_and_covers(values: list[float], top: float) -> None:
    ticks = scale(values)
    assert ticks[0] == 0.0
    assert ticks[-1] == pytest.approx(top)
    assert len(ticks) <= 6


def test_a_chart_of_many_bars_grows_wide_and_one_of_none_is_drawn() -> None:
    wide = bar_chart([Bar(1.0, f"{i}", "block") for i in range(1000)], label="errors")
    assert 'viewBox="0 0 4060 260"' in wide
    assert "<rect" not in bar_chart([], label="errors")


@pytest.mark.parametrize("width", [40, 60, 80, 110])
@pytest.mark.parametrize("depth", [3, 12, 17, 200])
def test_tables_fit_and_stay_short(width: int, depth: int) -> None:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(report(depth))
    lines = capture.get().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert len(lines) < 110


def test_deep_models_are_told_by_kind_of_block_and_json_leaves_nothing_out() -> None:
    facts = report(200)
    assert "encoder.0-199" in str(facts)
    assert "encoder.199.dense" in str(facts)  # the largest error
    assert len(facts.to_json()["certificate"]["layers"]) == 201


def test_refusals_are_counted_by_reason() -> None:
    (refusal,) = report().refusals
    assert refusal.places == ("head", "tail")
    assert "head and 1 more" in str(report())


@pytest.mark.parametrize(
    ("name", "block"),
    [("encoder.layer.10.a.weight", "encoder.layer.10"), ("pooler.dense.bias", "pooler"), ("0.weight", "0"), ("w", "w")],
)
def test_block_of(name: str, block: str) -> None:
    assert block_of(name) == block


def test_blocks_are_in_the_order_of_their_numbers() -> None:
    assert [b.name for b in report(11).blocks][:-1] == [f"encoder.{i}" for i in range(11)]


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("8-symmetric-channel-nearest", "int8 per channel"),
        ("4-asymmetric-group128-nearest", "uint4 in groups of 128"),
        ("1-binary-tensor-nearest", "binary per tensor"),
        ("float32", "float32"),
        ("folded away", "folded away"),
    ],
)
def test_spoken(scheme: str, words: str) -> None:
    assert spoken(scheme) == words


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (90_868_376, "90.9 MB"), (999_600, "1.0 MB")],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text
