"""The transfer rules of recurrent layers, of complex numbers, and of what is written by number."""

from __future__ import annotations

from typing import Any

import torch
from rules import SEQUENCE, THROUGH, Case, rows, w
from torch import Tensor, nn

A = torch.ops.aten


def recurrent(ops: str, make: Any, gates: int, *, width: int, layers: int = 1, both: bool = False) -> Case:
    """Linear, recurrent, linear: its inputs and its states are two groups."""
    times = f"/{gates}" if gates > 1 else ""
    suffixes = [f"l{n}{way}" for n in range(layers) for way in (("", "_reverse") if both else ("",))]
    inputs = " ".join(f"r.weight_ih_{s}[1]" for s in suffixes if s.startswith("l0"))
    states = [f"r.{kind}_{s}[0]{times}" for s in suffixes for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    states += [f"r.weight_hh_{s}[1]" for s in suffixes]
    twice = "/2" if both else ""
    states += [f"r.weight_ih_{s}[1]{twice}" for s in suffixes if not s.startswith("l0")]
    groups = (
        f"rows 12: a.weight[0] a.bias[0] {inputs}",
        f"rows 8: {' '.join(states)} b.weight[1]{twice}",
    )
    parts = {"a": lambda: nn.Linear(6, 12), "r": make, "b": lambda: nn.Linear(width, 3)}
    return Case(tuple(ops.split()), lambda m, x: m.b(m.r(m.a(x))[0]), parts, SEQUENCE, groups)


def numbered(ops: str, op: Any) -> dict[str, Case]:
    """Rows that are written by number beside what is pruned, and what is pruned written by number."""
    return {
        f"{ops}, rows": rows(ops, lambda m, y: op(torch.zeros_like(y) * y, 0, m.i.expand(4, 12), y), i=order(4)),
        f"{ops}, what is pruned": rows(
            ops,
            lambda m, y: op(torch.zeros_like(y) * y, 1, m.i.view(1, 12).expand(4, 12), y),
            groups=[],
            stays={"a.weight[0]": "it is indexed by number"},
            i=order(12),
        ),
        f"{ops}, in part": rows(
            ops,
            lambda m, y: op(torch.zeros_like(y) * y, 0, m.i.expand(4, 7), y),
            groups=[],
            stays={"a.weight[0]": "it is used in part"},
            i=order(4),
        ),
    }


def order(n: int) -> Any:
    return lambda: nn.Buffer(torch.arange(n).flip(0)[:, None])


def turned(m: Any, y: Tensor) -> Tensor:
    """Pairs of numbers as complex ones, each turned by an angle."""
    z = torch.view_as_complex(y.view(4, 6, 2)) * torch.polar(m.r, m.t)
    return torch.view_as_real(z).flatten(1)


RECURRENT = {
    "lstm": recurrent("lstm.input", lambda: nn.LSTM(12, 8), 4, width=8),
    "lstm, two layers both ways": recurrent(
        "lstm.input",
        lambda: nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True),
        4,
        width=16,
        layers=2,
        both=True,
    ),
    "gru, two layers": recurrent("gru.input", lambda: nn.GRU(12, 8, 2), 3, width=8, layers=2),
    "gru, both ways": recurrent("gru.input", lambda: nn.GRU(12, 8, bidirectional=True), 3, width=16, both=True),
    "rnn": recurrent("rnn_tanh.input", lambda: nn.RNN(12, 8, 2), 1, width=8, layers=2),
    "rnn with relu": recurrent("rnn_relu.input", lambda: nn.RNN(12, 8, nonlinearity="relu"), 1, width=8),
    "lstm, projected": Case(
        ("lstm.input",),
        lambda m, x: m.b(m.r(m.a(x))[0]),
        {
            "a": lambda: nn.Linear(6, 12),
            "r": lambda: nn.LSTM(12, 8, proj_size=5, bias=False),
            "b": lambda: nn.Linear(5, 3),
        },
        SEQUENCE,
        (
            "rows 12: a.weight[0] a.bias[0] r.weight_ih_l0[1]",
            "rows 8: r.weight_ih_l0[0]/4 r.weight_hh_l0[0]/4 r.weight_hr_l0[1]",
            "rows 5: r.weight_hh_l0[1] r.weight_hr_l0[0] b.weight[1]",
        ),
    ),
    "lstm, a state that is given out": Case(
        ("lstm.input",),
        lambda m, x: m.r(m.a(x))[1][0],
        {"a": lambda: nn.Linear(6, 12), "r": lambda: nn.LSTM(12, 8)},
        SEQUENCE,
        ("rows 12: a.weight[0] a.bias[0] r.weight_ih_l0[1]",),
        {"r.weight_hh_l0[1]": "it is an output"},
    ),
}

CASES = {
    "pairs as complex numbers": rows(
        "view_as_complex polar view_as_real",
        turned,
        groups=["rows 6: a.weight[0]/2 a.bias[0]/2 b.weight[1]/2 r[0] t[0]"],
        r=w(6),
        t=w(6),
    ),
    "parts": rows(
        "complex real imag _conj resolve_conj",
        lambda m, y: (lambda z: z.real + (z * 2j).conj().resolve_conj().imag)(torch.complex(y, y * 2)),
    ),
    **{
        f"{name}, another dimension": rows(
            f"fft_{name}", lambda m, y, op=op: op(y, 1).real.float()[:, 1], shape=SEQUENCE
        )
        for name, op in (
            ("fft", lambda y, d: torch.fft.fft(y, dim=d)),
            ("ifft", lambda y, d: torch.fft.ifft(y, dim=d)),
            ("rfft", lambda y, d: torch.fft.rfft(y, dim=d)),
            ("irfft", lambda y, d: torch.fft.irfft(y, n=6, dim=d)),
            ("fft2", lambda y, d: torch.fft.fft2(y, dim=(0, d))),
            ("ifft2", lambda y, d: torch.fft.ifft2(y, dim=(0, d))),
            ("rfft2", lambda y, d: torch.fft.rfft2(y, dim=(0, d))),
            ("irfft2", lambda y, d: torch.fft.irfft2(y, s=(4, 6), dim=(0, d))),
            ("fftn", lambda y, d: torch.fft.fftn(y, dim=(0, d))),
            ("ifftn", lambda y, d: torch.fft.ifftn(y, dim=(0, d))),
            ("rfftn", lambda y, d: torch.fft.rfftn(y, dim=(0, d))),
            ("irfftn", lambda y, d: torch.fft.irfftn(y, s=(4, 6), dim=(0, d))),
        )
    },
    "fft, what is pruned": rows(
        "fft_rfft",
        lambda m, y: torch.fft.rfft(y).real,
        7,
        groups=[],
        stays={"a.weight[0]": "it moves along it", "b.weight[1]": "it moves along it"},
    ),
    **numbered("scatter_add", lambda z, d, i, y: z.scatter_add(d, i, y)),
    **numbered("scatter_add_", lambda z, d, i, y: z.scatter_add_(d, i, y)),
    **numbered("scatter_reduce.two", lambda z, d, i, y: z.scatter_reduce(d, i, y, "amax")),
    **numbered("scatter_reduce_.two", lambda z, d, i, y: z.scatter_reduce_(d, i, y, "mean")),
    **numbered("scatter.src", lambda z, d, i, y: z.scatter(d, i, y)),
    "index_put": rows(
        "index_put", lambda m, y: (y * 0).index_put((m.i,), y[:2]), i=lambda: nn.Buffer(torch.tensor([2, 0]))
    ),
    "index_put, adding": rows(
        "index_put_",
        lambda m, y: (y * 2).index_put_((m.i,), m.v, accumulate=True),
        groups=[THROUGH + " v[0]"],
        i=lambda: nn.Buffer(torch.tensor([2, 0])),
        v=w(12),
    ),
    "index_put, what is pruned": rows(
        "index_put",
        lambda m, y: y.index_put((m.i, m.i), y[:2, 0]),
        groups=[],
        stays={"a.weight[0]": "it is indexed by number"},
        i=lambda: nn.Buffer(torch.tensor([2, 0])),
    ),
    "index_put, where a mask says so": rows(
        "index_put_",
        lambda m, y: (y * 2).index_put_((m.v.expand_as(y) > 0,), torch.tensor(0.5)),
        groups=[THROUGH + " v[0]"],
        v=w(12),
    ),
    "index_put, numbers where a mask says so": rows(
        "index_put_",
        lambda m, y: (y * 2).index_put_((y > 0,), y[y > 0]),
        groups=[],
        stays={"a.weight[0]": "no rule for aten.index"},
    ),
    "parts that may be written": rows(
        "unsafe_split.Tensor unsafe_split_with_sizes unsafe_chunk",
        lambda m, y: torch.cat(
            [
                A.unsafe_split.Tensor(y, 6, -1)[0].mul_(2),
                A.unsafe_split_with_sizes(y, [6, 6], -1)[1].mul_(3) + A.unsafe_chunk(y, 2, -1)[1],
            ],
            -1,
        ),
        groups=["rows 6: a.weight[0] a.bias[0] b.weight[1]"] * 2,
    ),
}
