"""Hypothesis strategies that several tests share: schemes, and tensors that are hard to quantise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from dwindle.runtime.scheme import Scheme

UNIFORM = ("symmetric", "asymmetric")
KINDS = (*UNIFORM, "ternary", "binary")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# hi - lo of a uniform group must be finite in fp32; sums of |x| (ternary, binary) over 200 elements as well.
LARGEST = {"symmetric": 1e38, "asymmetric": 1e38, "ternary": 1e36, "binary": 1e36}


@st.composite
def schemes(draw: Any, kinds: tuple[str, ...] = KINDS, most_bits: int = 16) -> Scheme:
    """Any scheme of these kinds."""
    kind = draw(st.sampled_from(kinds))
    bits = {"ternary": 2, "binary": 1}.get(kind) or draw(st.integers(2, most_bits))
    granularity = draw(st.sampled_from(("tensor", "channel", "token", "group")))
    size = draw(st.sampled_from((1, 2, 3, 4, 7, 8))) if granularity == "group" else None
    return Scheme(bits=bits, kind=kind, granularity=granularity, group_size=size)


@st.composite
def shapes(draw: Any, scheme: Scheme) -> tuple[int, ...]:
    """One to four odd dimensions that the scheme divides; a filter (O, C, h, w) groups along C h w."""
    dims = draw(st.integers(1, 4))
    shape = draw(st.lists(st.sampled_from((1, 2, 3, 5)), min_size=dims, max_size=dims))
    if scheme.group_size is not None:
        shape[1 if dims == 4 else -1] *= scheme.group_size
    elif dims < 4:
        shape[-1] = draw(st.sampled_from((1, 2, 3, 7, 16, 33)))
    return tuple(shape)


@st.composite
def tensors(draw: Any, scheme: Scheme, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """Finite tensors for `scheme`: drawn element by element, or random with one of the shapes that hurt."""
    shape = draw(shapes(scheme))
    dtype = draw(st.sampled_from(dtypes))
    n = math.prod(shape)
    largest = LARGEST[scheme.kind]
    pattern = draw(st.sampled_from(("drawn", "normal", "mixed", "zeros", "constant", "outlier", "subnormal", "halves")))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponent = draw(st.integers(-38, 34))
    x = rng.standard_normal(n) * 10.0**exponent
    match pattern:
        case "drawn":
            number = st.floats(-largest, largest, width=64, allow_nan=False)
            x = np.array([draw(number) for _ in range(min(n, 6))] * (n // 6 + 1))[:n]
        case "mixed":  # magnitudes from subnormal to large, and rows of zeros
            x = rng.standard_normal(n) * 10.0 ** rng.integers(-44, 35, n)
            x.reshape(-1, shape[-1])[rng.random(n // shape[-1]) < 0.3] = 0.0
        case "zeros":
            x[:] = 0.0
        case "constant":
            x[:] = x[0]
        case "outlier":
            x[rng.integers(n)] *= 1e3
        case "subnormal":
            x = rng.standard_normal(n) * 1e-41
        case "halves":  # ties of rint
            x = rng.integers(-9, 10, n) * 0.5
    top = min(largest, float(torch.finfo(dtype).max))
    return torch.from_numpy(x.clip(-top, top)).to(dtype).reshape(shape)


def stochastic(scheme: Scheme) -> Scheme:
    """The same scheme with stochastic rounding."""
    return replace(scheme, rounding="stochastic")
