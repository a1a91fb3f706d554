"""Every rewrite rule: fires n times, keeps the numbers, leaves the near miss alone, does nothing the second time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from numerics import error
from torch import Tensor, nn
from torch.nn import functional as F

from dwindle.frontends.capture import capture
from dwindle.passes.canonicalize import EXACT, TO_LINEAR, canonicalize
from dwindle.passes.driver import Driver, Pass
from dwindle.passes.fold import BATCH_NORM_INTO_CONV, fold_constants
from dwindle.passes.rewrite import Rule, apply_rules
from dwindle.runtime.errors import PassError
from dwindle.runtime.model import flat_outputs
from dwindle.runtime.program import Program
from dwindle.runtime.store import Store

RULES = {rule.name.partition(".")[2]: rule for rule in (*EXACT, *TO_LINEAR, BATCH_NORM_INTO_CONV)}


class _Model(nn.Module):
    """A module whose forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _captured(model: nn.Module, x: Tensor, *, training: bool = False) -> Program:
    (name,) = inspect.signature(model.forward).parameters
    return capture(model, {name: x}, Store.of(model), training=training, dynamic_shapes={})


def _weight(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def _normed(groups: int = 1) -> dict[str, nn.Module]:
    norm = nn.BatchNorm2d(6)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(6))
        norm.running_var.uniform_(0.5, 2.0)
    return {"conv": nn.Conv2d(4, 6, 3, groups=groups, bias=False), "norm": norm}


@dataclass(frozen=True)
class Case:
    """What a rule fires on `times` times, and a near miss that it must leave alone."""

    rule: str
    times: int
    hit: Callable[[], tuple[nn.Module, Tensor]]
    miss: Callable[[], tuple[nn.Module, Tensor]]


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
IMAGE = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(4))


def _conv1d(m: Any, x: Tensor) -> Tensor:
    return torch.addmm(m.b, x.view(-1, 8), m.w).view(2, 5, 3)


def _softmax_read_twice(m: Any, x: Tensor) -> Tensor:
    y = x.softmax(-1)
    half = y[..., :4]
    y.masked_fill_(x < 0, 0.0)
    return half


def _counted(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        rows, scale = 2 * x.shape[0], x.abs().amax()
    return (x * scale).reshape(rows, 4)


CASES = (
    Case(
        "dropout_off",
        2,
        lambda: (_Model(lambda m, x: F.dropout(F.dropout(x, 0.5, False).sin(), 0.1, False)), X),
        lambda: (_Model(lambda m, x: F.dropout(x, 0.5, True)), X),
    ),
    Case(
        "dropout_zero",
        1,
        lambda: (_Model(lambda m, x: F.dropout(x, 0.0, True).sin()), X),
        lambda: (_Model(lambda m, x: F.dropout(x, 0.5, True)), X),
    ),
    Case(
        "no_op",
        2,
        lambda: (_Model(lambda m, x: x.sin().to(torch.float32).cos().type_as(x)), X),
        lambda: (_Model(lambda m, x: x.transpose(0, 1).contiguous().to(torch.float64).sin()), X),
    ),
    Case(
        "conv_padding",
        3,
        lambda: (
            nn.Sequential(
                nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(1, 2)),
                nn.Conv2d(6, 6, 3, padding="same", groups=2, bias=False),
                nn.Conv2d(6, 4, 2, stride=2, padding="valid"),
            ),
            IMAGE,
        ),
        lambda: (nn.Conv2d(4, 6, (3, 4), padding="same"), IMAGE),
    ),
    Case(
        "softmax_masked",
        1,
        lambda: (_Model(lambda m, x: x.softmax(-1).masked_fill_(x < 0, 0.0).sin()), X),
        lambda: (_Model(_softmax_read_twice), X),
    ),
    Case(
        "conv1d_to_linear",
        1,
        lambda: (_Model(_conv1d, w=_weight(8, 3), b=_weight(3)), X),
        lambda: (_Model(lambda m, x: torch.addmm(m.b, x.view(-1, 8), m.w).view(30), w=_weight(8, 3), b=_weight(3)), X),
    ),
    Case(
        "addmm_to_linear",
        1,
        lambda: (_Model(lambda m, x: torch.addmm(m.b, x[0], m.w), w=_weight(8, 3), b=_weight(3)), X),
        lambda: (_Model(lambda m, x: torch.addmm(m.b, x[0], m.w, alpha=2), w=_weight(8, 3), b=_weight(3)), X),
    ),
    Case(
        "matmul_to_linear",
        1,
        lambda: (_Model(lambda m, x: x @ m.w, w=_weight(8, 3)), X),
        lambda: (_Model(lambda m, x: (x @ m.w) + (x @ x.transpose(1, 2)).sum(), w=_weight(2, 8, 3)), X),
    ),
    Case(
        "batch_norm_into_conv",
        1,
        lambda: (_Model(lambda m, x: m.norm(m.conv(x)), **_normed()), IMAGE),
        lambda: (_Model(lambda m, x: m.norm(m.conv(x)) + m.conv(x), **_normed()), IMAGE),
    ),
)


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in CASES} == set(RULES)


def _apply(program: Program, rule: Rule) -> int:
    return apply_rules(program, (rule,), "test")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_rule_counts_compares_refuses_repeats(case: Case) -> None:
    rule = RULES[case.rule]
    torch.manual_seed(0)
    model, x = case.hit()
    program = _captured(model.eval(), x)
    with torch.no_grad():
        expected = flat_outputs(program.run([x]))
    assert _apply(program, rule) == case.times
    assert [e.rule for e in program.log if e.applied] == [rule.name] * case.times
    with torch.no_grad():
        found = flat_outputs(program.run([x]))
    for a, b in zip(expected, found, strict=True):
        assert (error(a, b) < 1e-5) if rule.approximate else torch.equal(a, b)
    assert _apply(program, rule) == 0
    program.graph.lint()

    near, x = case.miss()
    other = _captured(near.eval(), x)
    before = str(other.graph)
    assert _apply(other, rule) == 0
    assert str(other.graph) == before


def test_a_masked_softmax_has_a_gradient() -> None:
    model = _Model(lambda m, x: (x @ m.w).softmax(-1).masked_fill_(x < 0, 0.0), w=_weight(8, 8))
    program = _captured(model, X)
    with pytest.raises(RuntimeError, match="inplace"):
        program.run([X])[0].sum().backward()
    canonicalize(program)
    program.run([X])[0].square().sum().backward()
    weight = program.store.get("w")
    assert isinstance(weight, nn.Parameter)
    assert weight.grad is not None


def test_a_size_from_a_region_without_gradient_stays_a_number() -> None:
    model = _Model(_counted)
    program = capture(model, {"x": torch.randn(3, 8)}, Store.of(model), dynamic_shapes={"x": {0: "batch"}})
    for x in (torch.randn(3, 8), torch.randn(5, 8)):
        assert torch.equal(program.run([x])[0], model(x))


def test_values_stay_recorded() -> None:
    model = _Model(_conv1d, w=_weight(8, 3), b=_weight(3))
    program = _captured(model, X)
    apply_rules(program, TO_LINEAR, "test")
    (linear,) = program.calls(torch.ops.aten.linear.default)
    assert linear.meta["val"].shape == (2, 5, 3)


def test_a_batch_norm_in_training_is_not_folded() -> None:
    program = _captured(_Model(lambda m, x: m.norm(m.conv(x)), **_normed()), IMAGE, training=True)
    assert apply_rules(program, (BATCH_NORM_INTO_CONV,), "test") == 0


def test_constants_fold_once_and_exactly() -> None:
    model = _Model(lambda m, x: x + torch.arange(8).float().mul(2).cos() * m.table.sin())
    model.register_buffer("table", torch.randn(8))
    program = _captured(model, X)
    expected = program.run([X])
    before = len(program.graph.nodes)
    fold_constants(program)
    assert len(program.graph.nodes) < before
    assert torch.equal(program.run([X])[0], expected[0])
    again = str(program.graph)
    fold_constants(program)
    assert str(program.graph) == again


def test_random_numbers_are_no_constants() -> None:
    model = _Model(lambda m, x: x + torch.rand_like(m.table))
    model.register_buffer("table", torch.randn(8))
    program = _captured(model, X)
    fold_constants(program)
    assert program.calls(torch.ops.aten.rand_like.default)


def test_the_driver_names_what_ran_before() -> None:
    program = _captured(_Model(lambda m, x: x.sin().cos()), X)
    driver = Driver(program, [X])

    def break_it(p: Program) -> Program:
        (cos,) = p.calls(torch.ops.aten.cos.default)
        cos.target = torch.ops.aten.sin.default
        return p

    driver.apply(Pass(name="canonicalize", run=canonicalize, exact=True))
    with pytest.raises(PassError, match=r"(?s)wrong failed after: canonicalize.*an exact pass moved an output"):
        driver.apply(Pass(name="wrong", run=break_it, exact=True))


def test_the_driver_wraps_what_a_pass_raises() -> None:
    driver = Driver(_captured(_Model(lambda m, x: x.sin()), X), [X])

    def fail(p: Program) -> Program:
        raise ZeroDivisionError("no")

    with pytest.raises(PassError, match=r"(?s)fails failed after: capture alone.*ZeroDivisionError"):
        driver.apply(Pass(name="fails", run=fail))


def test_the_driver_bounds_an_approximate_pass() -> None:
    driver = Driver(_captured(_Model(lambda m, x: x.sin()), X), [X])

    def double(p: Program) -> Program:
        (sin,) = p.calls(torch.ops.aten.sin.default)
        sin.target = torch.ops.aten.tanh.default
        return p

    with pytest.raises(PassError, match=r"at most 0\.001 promised"):
        driver.apply(Pass(name="coarse", run=double, limit=1e-3))
