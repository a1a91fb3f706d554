"""How much the loss bends in each block's parameters: pure functions of a loss and tensors, no graph.

    H_b = d2L / d theta_b d theta_b     the block's own part of the Hessian, never formed
    H_b v = d <g_b, v> / d theta_b      one product costs about one backward pass; g = dL / d theta is built once

    eigenvalues   s_k = |H v_k|, v_k+1 = H v_k / s_k with |v_k| = 1: power iteration on H_b
    traces        E[v' H v] = tr H for v of independent signs (Hutchinson 1990); terms between two blocks have
                  mean 0, so one product over all parameters is a sample for every block

s_k^2 = <v_k, H^2 v_k> <= |H^2 v_k| = s_k s_k+1: s_k never falls, and s_k <= max |eigenvalue|. So it is the value
reported, and its growth the stop rule, also where eigenvalues l and -l share the top: there the Rayleigh quotient
<v, H v> stands still at any number between them (DeepSpeed stops on it, and finds 1.44 for diag(3, -3)). Growth
that is small but rising is a plateau below an eigenvector that v has hardly met yet, and does not stop it. Small
growth bounds no error all the same: a top eigenvalue close to the next one is underestimated.

Eigenvalues: Yao et al. 2019, "PyHessian", arXiv 1912.07145; their use as periods: DeepSpeed's MoQ.
Traces: Dong et al. 2019, "HAWQ-V2", arXiv 1911.03852.

Not handled: gradients that exist on one rank only (FSDP, ZeRO); sparse gradients; the state of random generators
other than the CPU's and CUDA's.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...runtime.errors import ArtifactError, CalibrationError
from ...runtime.numerics import stochastic_key

Blocks = Mapping[str, Sequence[Tensor]]
Measure = Literal["eigenvalue", "trace"]

CALM = 2  # steps in a row whose growth must be within the tolerance and falling
STEPS = 4  # factors are 1 to 1 + STEPS, as in MoQ


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """What was found of one block.

    value: max |eigenvalue| of H_b, or tr H_b / parameters (signed); the last finite one if not `finite`
    rayleigh: <v, H v> / <v, v> of the last v, or the mean over all of them: the sign of the curvature
    iterations: products that went into it
    converged: the stop rule was met; for a trace, that every sample was finite
    finite: no product held NaN or infinity (or left fp32 when squared)
    parameters: scalars that require grad and that the loss reaches
    standard_error: of a trace's value, from two samples on
    """

    value: float = 0.0
    rayleigh: float = 0.0
    iterations: int = 0
    converged: bool = True
    finite: bool = True
    parameters: int = 0
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The curvature of each block, in the order asked for, and what it cost. Equal if all but `seconds` is equal."""

    measure: Measure
    blocks: Mapping[str, Curvature]
    products: int
    seconds: float = field(compare=False)

    @property
    def cost(self) -> str:
        """One line for a report."""
        return f"{self.products} Hessian-vector products of {len(self.blocks)} blocks in {self.seconds:.3g} s"

    def normalized(self) -> dict[str, float]:
        """|value| / max |value|, in [0, 1]. A block that is not finite is 1, a block that is exactly zero 0."""
        most = max((abs(c.value) for c in self.blocks.values() if c.finite), default=0.0)
        return {name: 1.0 if not c.finite else abs(c.value) / most if most else 0.0 for name, c in self.blocks.items()}

    def factors(self) -> dict[str, int]:
        """1 + floor(4 normalized), 1 to 5: by how much MoQ stretches the block's quantisation period."""
        return {name: 1 + math.floor(STEPS * share) for name, share in self.normalized().items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data; every number in it is finite."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Sensitivity:
        """Inverse of `to_json`. Raises ArtifactError on data of another form."""
        try:
            blocks = {str(name): Curvature(**found) for name, found in data["blocks"].items()}
            return Sensitivity(**{**data, "blocks": blocks})
        except (AttributeError, KeyError, TypeError) as error:
            raise ArtifactError(
                "a saved sensitivity cannot be read",
                required="what Sensitivity.to_json wrote",
                found=str(error),
                cure="measure it again",
            ) from error


def eigenvalues(
    loss: Callable[[], Tensor],
    blocks: Blocks,
    *,
    iterations: int = 100,
    tolerance: float = 1e-2,
    stability: float = 1e-6,
    seed: int = 0,
) -> Sensitivity:
    """max |eigenvalue| of the Hessian of `loss()` in each block: name -> parameters.

    tolerance: of |s_k - s_k-1| / (s_k + stability), twice in a row and not rising. A curvature far below
        `stability` counts as settled at once; give 0 where the loss itself is that small.
    seed: of the start vectors, by block name and place in the block, and of the random numbers that `loss` draws.
        A block's value does not depend on the other blocks. Random generators are left as they were.

    `loss` is called once, with attention written out (the fused kernels have no second derivative); its graph is
    kept until the end, so all products see the same dropout. `.grad` is neither read nor written. Norms are taken
    in fp32 at least; v and H v have the parameter's dtype, so fp16 loses products below 6e-8.
    Raises CalibrationError if the loss is not finite, not a scalar, or cannot be differentiated twice.
    """
    _at_least_one("iterations", iterations)
    start, found = time.perf_counter(), {}
    with _graph(loss, blocks, seed) as graph:
        for name, block in graph.items():
            found[name] = _power(block, iterations, tolerance, stability, seed)
            block.rows.clear()
    return Sensitivity(
        measure="eigenvalue",
        blocks=found,
        products=sum(c.iterations for c in found.values()),
        seconds=time.perf_counter() - start,
    )


def traces(loss: Callable[[], Tensor], blocks: Blocks, *, samples: int = 8, seed: int = 0) -> Sensitivity:
    """tr H_b / (number of parameters) of each block with its standard error; see `eigenvalues` for the rest.

    One product a sample serves all blocks. So a block's samples (not their mean) depend on the other blocks, and
    one that is not finite can make those that the loss couples to it not finite; `eigenvalues` keeps them apart.
    """
    _at_least_one("samples", samples)
    start, products = time.perf_counter(), 0
    drawn: dict[str, list[float]] = {name: [] for name in blocks}
    with _graph(loss, blocks, seed) as graph:
        sizes = {name: block.size for name, block in graph.items()}
        for sample in range(samples):
            live = [name for name, block in graph.items() if block.rows and all(map(math.isfinite, drawn[name]))]
            if not live:
                break
            terms = _terms(graph, seed, sample)
            products += 1
            for name in live:
                drawn[name].append(sum(terms[id(row.parameter)] for row in graph[name].rows))
    return Sensitivity(
        measure="trace",
        blocks={name: _mean(drawn[name], sizes[name]) for name in blocks},
        products=products,
        seconds=time.perf_counter() - start,
    )


class _Row(NamedTuple):
    key: str  # what its random vectors hang on: block name and place in the block
    parameter: Tensor
    gradient: Tensor  # with its graph


class _Block(NamedTuple):
    size: int  # scalars that the loss reaches
    rows: list[_Row]  # those whose gradient depends on anything; in the others the loss is linear, H is zero


@contextmanager
def _graph(loss: Callable[[], Tensor], blocks: Blocks, seed: int) -> Iterator[dict[str, _Block]]:
    """Each block's parameters, once each. Nothing holds the loss's graph when the context ends."""
    wanted = {id(p): p for block in blocks.values() for p in block if p.requires_grad and p.numel()}
    devices = sorted({p.device.index for p in wanted.values() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which reaches every device
        for index in devices:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        held = [loss()]
    try:
        problem = _problem(held[0])
        if problem is not None:
            raise problem
        first = _grad(held, list(wanted.values()), None, create_graph=True) if wanted else ()
    finally:
        held.clear()  # an error's traceback would keep it, and its graph
    gradients = {key: g for key, g in zip(wanted, first, strict=True) if g is not None}
    graph = {name: _block(name, block, gradients) for name, block in blocks.items()}
    early = _ends_early(gradients.values())
    del first, gradients
    try:
        if early:
            raise _once("a function marked @once_differentiable")
        yield graph
    finally:
        for block in graph.values():
            block.rows.clear()


def _block(name: str, parameters: Sequence[Tensor], gradients: Mapping[int, Tensor]) -> _Block:
    rows: dict[int, _Row] = {}
    for place, p in enumerate(parameters):
        if id(p) in gradients:
            rows.setdefault(id(p), _Row(f"{name}:{place}", p, gradients[id(p)]))
    size = sum(row.parameter.numel() for row in rows.values())
    return _Block(size, [row for row in rows.values() if row.gradient.requires_grad])


def _problem(value: object) -> CalibrationError | None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        cure = "reduce it: loss.mean(), or the model's output.loss"
        return CalibrationError("the loss is not a scalar", required="a tensor of one element", found=found, cure=cure)
    if not value.isfinite():
        return CalibrationError(
            "the loss is not finite",
            required="a finite loss",
            found=float(value.detach()),
            cure="check the data and the checkpoint",
        )
    if not value.requires_grad:
        return CalibrationError(
            "the loss carries no gradient graph",
            required="a loss computed from parameters that require grad",
            found="requires_grad=False",
            cure="compute it without torch.no_grad, inference_mode and detach; unfreeze a parameter",
        )
    return None


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], v: Sequence[Tensor] | None, *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(outputs, inputs, v, retain_graph=True, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        traceback.clear_frames(error.__traceback__)  # torch's hold the graph
        del outputs
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _once(str(error)) from error


def _once(found: str) -> CalibrationError:
    return CalibrationError(
        "the loss cannot be differentiated twice",
        required="operators with a second derivative",
        found=found,
        cure="use the eager model: not compiled, not checkpointed with use_reentrant=True, no fused kernels",
    )


def _ends_early(gradients: Iterable[Tensor]) -> bool:
    """Whether a gradient passed a function marked @once_differentiable, whose derivative autograd takes for zero."""
    seen, nodes = set(), [g.grad_fn for g in gradients]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("Error"):
            return True
        seen.add(node)
        nodes.extend(after for after, _ in node.next_functions)
    return False


def _product(rows: Sequence[_Row], v: Sequence[Tensor]) -> list[Tensor]:
    """H v over the rows' parameters, in their shapes and dtypes."""
    found = _grad([row.gradient for row in rows], [row.parameter for row in rows], v, create_graph=False)
    return [torch.zeros_like(x) if h is None else h for x, h in zip(v, found, strict=True)]


def _power(block: _Block, iterations: int, tolerance: float, stability: float, seed: int) -> Curvature:
    best = Curvature(parameters=block.size)
    if not block.rows:
        return best
    v = _unit([_normal(row, seed) for row in block.rows])
    noise = 4 * max(torch.finfo(t.dtype).eps for t in v)
    calm, before = 0, math.inf
    for count in range(1, iterations + 1):
        h = _product(block.rows, v)
        length = _norm(v)  # 1 but for the rounding to the parameter's dtype
        s = _norm(h) / length
        if not math.isfinite(s):
            return replace(best, iterations=count, converged=False, finite=False)
        growth = abs(s - best.value) if count > 1 else math.inf
        small = growth <= tolerance * (s + stability)
        calm = calm + 1 if small and growth <= max(before, noise * s) else 0
        before = growth
        settled = calm >= CALM or s == 0.0  # a random v is in the kernel of H only where H is zero
        rayleigh = sum(map(_dot, v, h)) / length**2
        best = replace(best, value=s, rayleigh=rayleigh, iterations=count, converged=settled)
        if settled:
            break
        v = _unit(h)
    return best


def _terms(graph: Mapping[str, _Block], seed: int, sample: int) -> dict[int, float]:
    """<v, H v> of each parameter by identity, v over all of them."""
    # Sorted: neither the vector of a parameter in two blocks nor the order of sums depends on the blocks' order
    rows = list({id(row.parameter): row for name in sorted(graph) for row in graph[name].rows}.values())
    try:
        v = [_signs(row, seed, sample) for row in rows]
        h = _product(rows, v)
        return {id(row.parameter): _dot(x, y) for row, x, y in zip(rows, v, h, strict=True)}
    finally:
        rows.clear()


def _mean(drawn: list[float], size: int) -> Curvature:
    kept = [x / size for x in drawn if math.isfinite(x)]
    value = fmean(kept) if kept else 0.0
    finite = len(kept) == len(drawn)
    return Curvature(
        value=value,
        rayleigh=value,
        iterations=len(drawn),
        converged=finite,
        finite=finite,
        parameters=size,
        standard_error=stdev(kept) / math.sqrt(len(kept)) if len(kept) > 1 else None,
    )


def _normal(row: _Row, seed: int) -> Tensor:
    p = row.parameter
    generator = torch.Generator().manual_seed(stochastic_key(seed, 0, row.key))
    return torch.randn(p.shape, generator=generator, dtype=_wide(p)).to(p)  # drawn on the CPU: alike on any device


def _signs(row: _Row, seed: int, sample: int) -> Tensor:
    p = row.parameter
    generator = torch.Generator().manual_seed(stochastic_key(seed, sample, row.key))
    return torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).to(p).mul_(2).sub_(1)


def _unit(x: Sequence[Tensor]) -> list[Tensor]:
    norm = _norm(x)
    return [(t.to(_wide(t)) / norm).to(t.dtype) for t in x]


def _norm(x: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=_wide(t))) for t in x))


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x.to(_wide(x)) * y.to(_wide(y))).sum())


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise CalibrationError(f"{name} of a sensitivity is too small", required="1 or more", found=value)
