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
    lowering: Difference,
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
        lowering_error=lowering.relative,
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


class _Sites(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, names: Mapping[fx.Node, str]) -> None:
        super().__init__(module)
        self.names, self.values = names, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.names:
            self.values[self.names[n]] = value
        return value


def _layer_errors(finished: Program, original: Program, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Relative L2 error of each site's output, both programs run from the same inputs: errors accumulate."""
    before = _Sites(original.module, {site.node: site.fqn for site in find_sites(original)})
    after = _Sites(finished.module, {n: n.meta[SITE] for n in finished.graph.nodes if SITE in n.meta})
    with torch.no_grad():
        before.run(*inputs)
        after.run(*inputs)
    common = before.values.keys() & after.values.keys()
    return {name: difference([before.values[name]], [after.values[name]]).relative for name in common}
