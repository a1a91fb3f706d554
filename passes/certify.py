"""Looks at a finished program and writes down what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime.certificate import Certificate, Layer, Zeros
from ..runtime.errors import CertificateError
from ..runtime.ops.catalog import SIMULATED, by_overload
from ..runtime.program import Program, value_of
from ..runtime.qtensor import QTensor
from ..runtime.sparse_storage import stored_nbytes
from .quantize.insert import SITE
from .quantize.sites import find_sites
from .verify import Difference, difference
from .watch import watch


def certify(
    finished: Program,
    reference: Program,
    inputs: Sequence[Tensor],
    sizes: Mapping[str, int],
    lowering: float,
    output: Difference,
    patterns: Mapping[str, str],
) -> Certificate:
    """The certificate of `finished`, run on `inputs` beside `reference`, whose sites carry the same names.

    sizes: bytes of each of the model's tensors before, by stored name; patterns: of the zeros in those that have some
    """
    kernels = _dispatch(finished, inputs)
    errors = _layer_errors(finished, reference, inputs)
    layers = []
    now = dict(finished.store.entries())
    for name in sorted({*sizes, *now}):
        value = now.get(name)
        after = 0 if value is None else _nbytes(value)
        operator, kernel, declined = kernels.get(name, ("", "", ()))
        layers.append(
            Layer(
                name=name,
                operator=operator,
                scheme=_scheme(value),
                bytes_before=sizes.get(name, 0),
                bytes_after=after,
                kernel=kernel,
                declined=declined,
                error=errors.get(name),
                zeros=None if value is None or name not in patterns else count_zeros(value, patterns[name]),
            )
        )
    shapes = ", ".join(f"{s.name} {list(t.shape)}" for s, t in zip(finished.contract.inputs, inputs, strict=True))
    return Certificate(
        layers=tuple(layers),
        simulated=len(simulated(finished)),
        graph_breaks=sum(n.op == "call_module" for n in finished.graph.nodes),
        lowering_error=lowering,
        output_error=output.to_json(),
        inputs=shapes,
        torch=torch.__version__,
        rounding=rounding(finished),
    )


def rounding(program: Program) -> float:
    """eps of the coarsest dtype in which a lowered call gives its result."""
    return max((torch.finfo(value_of(n).dtype).eps for n in program.graph.nodes if SITE in n.meta), default=0.0)


def simulated(program: Program) -> list[fx.Node]:
    """Nodes that only simulate quantisation."""
    return program.calls(*(operator.overload for operator in SIMULATED))


def require_real(program: Program) -> None:
    """Raise CertificateError, naming the layers, when a lowered program still simulates something."""
    left = simulated(program)
    if left:
        users = [user.meta[SITE][0] for node in left for user in node.users if SITE in user.meta]
        raise CertificateError(
            "some layers have no integer form on this target",
            required="no node that only simulates quantisation",
            found=f"{len(left)}, read by {', '.join(users) or 'no layer'}",
            cure="exclude these layers in the recipe; the log has the reason for each",
        )


def tensor_sizes(program: Program) -> dict[str, int]:
    """Bytes of every tensor of the program's store, by name."""
    return {name: _nbytes(value) for name, value in program.store.entries()}


def count_zeros(value: Tensor | QTensor, pattern: str) -> Zeros:
    """Of a finished weight: those that a recipe asked for, and those that numbers were rounded to."""
    numbers = value.dequantize() if isinstance(value, QTensor) else value
    zeros = numbers.numel() - int(numbers.count_nonzero())
    return Zeros(pattern=pattern, zeros=zeros, total=numbers.numel(), stored=stored_nbytes(value, pattern))


def _nbytes(value: Tensor | QTensor) -> int:
    return value.nbytes if isinstance(value, QTensor) else value.numel() * value.element_size()


def _scheme(value: Tensor | QTensor | None) -> str:
    if value is None:
        return "folded away"
    return value.scheme.spell() if isinstance(value, QTensor) else str(value.dtype).removeprefix("torch.")


def _dispatch(program: Program, inputs: Sequence[Tensor]) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """By weight: the operator that reads it, the kernel that serves the values it really gets, why not others."""
    served: dict[str, tuple[str, str, tuple[str, ...]]] = {}

    def look(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        operator = by_overload(node.target) if node.op == "call_function" else None
        if operator is not None:
            kernel, declined = operator.explain(*args)
            for fqn in _weights_of(node):
                served[fqn] = (operator.name, kernel, tuple(declined))
        return value

    watch(program, inputs, look)
    return served


def _weights_of(node: fx.Node) -> list[str]:
    """Names of the QTensors whose codes a call reads, as they are or viewed."""
    sources = [n.all_input_nodes[0] if n.target is torch.ops.aten.view.default else n for n in node.all_input_nodes]
    names = [str(n.target) for n in sources if n.op == "get_attr"]
    return [name.removesuffix(".codes") for name in names if name.endswith(".codes")]


Call = tuple[str, str]


def _site_values(
    program: Program, inputs: Sequence[Tensor], forced: Mapping[Call, Tensor] | None = None
) -> tuple[dict[Call, Tensor], dict[Call, float]]:
    """Every site's output; with `forced`, its relative error against that, which the run then goes on from."""
    calls = {n: n.meta[SITE] for n in program.graph.nodes if SITE in n.meta}
    calls = calls or {site.node: (site.fqn, site.node.name) for site in find_sites(program)}
    values: dict[Call, Tensor] = {}
    errors: dict[Call, float] = {}

    def look(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        call = calls.get(node)
        if call is None:
            return value
        if forced is None:
            values[call] = value.clone()
            return value
        errors[call] = difference([forced[call]], [value]).relative
        return forced[call].clone()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a model may draw noise in eval mode too, and two runs are compared
        watch(program, inputs, look)
    return values, errors


def _layer_errors(finished: Program, reference: Program, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Relative L2 error of each site's output, both programs run from the same inputs: errors accumulate."""
    before, _ = _site_values(reference, inputs)
    after, _ = _site_values(finished, inputs)
    return {call[0]: difference([before[call]], [after[call]]).relative for call in after if call in before}


def lowering_error(finished: Program, simulated: Program, inputs: Sequence[Tensor]) -> float:
    """Largest relative L2 error of a lowered call against the simulated one *on the same input*.

    Whole graphs cannot be compared: a difference of one rounding flips the codes that lie on an edge, each
    flip moves the next layer's input by a step, and after a few layers the two differ about as much as
    either does from floating point (measured .054 on trained MiniLM, where each layer alone is within 1e-6).
    So every site's output is replaced by the simulated one before the next site sees it.
    """
    values, _ = _site_values(simulated, inputs)
    _, errors = _site_values(finished, inputs, values)
    return max(errors.values(), default=0.0)
