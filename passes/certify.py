"""Looks at a finished program and writes down what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime.certificate import Certificate, Layer
from ..runtime.ops.catalog import SIMULATED, by_overload
from ..runtime.program import Program
from ..runtime.qtensor import QTensor
from .quantize.insert import SITE
from .quantize.sites import find_sites
from .verify import Difference, difference


def certify(
    finished: Program,
    original: Program,
    inputs: Sequence[Tensor],
    sizes: Mapping[str, int],
    lowering: float,
    output: Difference,
) -> Certificate:
    """The certificate of `finished`, run on `inputs` beside `original`.

    sizes: bytes of each of the model's tensors before, by stored name.
    """
    kernels = _dispatch(finished, inputs)
    errors = _layer_errors(finished, original, inputs)
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
            )
        )
    simulated = len(finished.calls(*(operator.overload for operator in SIMULATED)))
    shapes = ", ".join(f"{s.name} {list(t.shape)}" for s, t in zip(finished.contract.inputs, inputs, strict=True))
    return Certificate(
        layers=tuple(layers),
        simulated=simulated,
        graph_breaks=sum(n.op == "call_module" for n in finished.graph.nodes),
        lowering_error=lowering,
        output_error=output.to_json(),
        inputs=shapes,
        torch=torch.__version__,
    )


def tensor_sizes(program: Program) -> dict[str, int]:
    """Bytes of every tensor of the program's store, by name."""
    return {name: _nbytes(value) for name, value in program.store.entries()}


def _nbytes(value: Tensor | QTensor) -> int:
    return value.nbytes if isinstance(value, QTensor) else value.numel() * value.element_size()


def _scheme(value: Tensor | QTensor | None) -> str:
    if value is None:
        return "folded away"
    return value.scheme.spell() if isinstance(value, QTensor) else str(value.dtype).removeprefix("torch.")


class _Dispatch(fx.Interpreter):
    """Asks each of our operators, on the values it really gets, which kernel serves it."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.served: dict[str, tuple[str, str, tuple[str, ...]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        operator = by_overload(n.target) if n.op == "call_function" else None
        if operator is not None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            kernel, declined = operator.explain(*args)
            for source in n.all_input_nodes:
                name = str(source.target).removesuffix(".codes")
                if source.op == "get_attr" and str(source.target).endswith(".codes"):
                    self.served[name] = (operator.name, kernel, tuple(declined))
                elif source.target is torch.ops.aten.view.default and source.all_input_nodes[0].op == "get_attr":
                    name = str(source.all_input_nodes[0].target).removesuffix(".codes")
                    self.served[name] = (operator.name, kernel, tuple(declined))
        return super().run_node(n)


def _dispatch(program: Program, inputs: Sequence[Tensor]) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    asked = _Dispatch(program)
    with torch.no_grad():
        asked.run(*inputs)
    return asked.served


Call = tuple[str, str]


class _Sites(fx.Interpreter):
    """Keeps the value of every site; where `forced` has one, compares with it and goes on from that one."""

    def __init__(self, module: fx.GraphModule, calls: Mapping[fx.Node, Call], forced: Mapping[Call, Tensor]) -> None:
        super().__init__(module)
        self.calls, self.forced = calls, forced
        self.values: dict[Call, Tensor] = {}
        self.errors: dict[Call, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        call = self.calls.get(n)
        if call is None:
            return value
        if call not in self.forced:
            self.values[call] = value.clone()  # a relu_ after this site writes into `value`
            return value
        self.errors[call] = difference([self.forced[call]], [value]).relative
        return self.forced[call].clone()


def _site_values(
    program: Program, inputs: Sequence[Tensor], forced: Mapping[Call, Tensor] | None = None
) -> tuple[dict[Call, Tensor], dict[Call, float]]:
    calls = {n: n.meta[SITE] for n in program.graph.nodes if SITE in n.meta}
    calls = calls or {site.node: (site.fqn, site.node.name) for site in find_sites(program)}
    run = _Sites(program.module, calls, forced or {})
    with torch.no_grad():
        run.run(*inputs)
    return run.values, run.errors


def _layer_errors(finished: Program, original: Program, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Relative L2 error of each site's output, both programs run from the same inputs: errors accumulate."""
    before, _ = _site_values(original, inputs)
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
