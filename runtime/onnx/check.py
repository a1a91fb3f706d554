"""Running an exported model with ONNX Runtime, and holding it to the Program it came from.

Two right implementations of one quantised model drift apart: a value at the edge of two codes takes the other
one, and each layer multiplies such flips (trained MiniLM: 3e-6 of the codes differ in layer 1, a third in layer
6, and the outputs by .06 to .09). So an end-to-end comparison must be lax, and would pass a wrong graph. Instead the
Program, with its own operators, is run *on the codes that ORT chose*:

    a quantisation   ORT's codes must be roundings of what the Program has there: |x - s (c - z)| <= (1/2 + e) s
                     for x within range; then both go on from ORT's codes
    MatMulNBits      quantises activations inside: its product must be near the Program's; both go on from ORT's
    an output        then differs by fp32 rounding alone

Scales, zero points, weights and biases are the Program's, and its operators say what they mean: nothing that the
translation decided is believed here but the codes. Dynamic ones come with ORT's scale and zero point, to which the
first line holds them, s being the Program's scale; and where ORT takes another zero point than the Program's none
(DynamicQuantizeLinear), which int8 cannot hold, the operator's formula runs in fp32.

A *probe*, the same graph with these values among its outputs, gives them; the file itself is held to the probe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..errors import ExportError
from ..ops.catalog import by_overload
from ..ops.qlinear import dequantize_packed
from ..ops.quantize import QUANTIZE_ASYMMETRIC, QUANTIZE_DYNAMIC
from ..program import Program
from ..scheme import Scheme
from .traced import SHIFT, SITE

if TYPE_CHECKING:
    import onnx_ir as ir

PROVIDERS = {"cpu": "CPUExecutionProvider"}

# Measured over five presets on tests/models.py and on trained MiniLM at two shapes, largest in brackets.
OUTPUT_LIMIT = 1e-4  # relative L2 of an output, on the same codes [1.4e-6]
STEP_LIMIT = 5e-3  # of a quantisation step, beyond the half that rounding takes [4.5e-5]
PRODUCT_LIMIT = 0.06  # relative L2 of one MatMulNBits [2.4e-2]
FREE_LIMIT = 0.3  # relative L2 of the file's outputs against the probe's: flipped codes, usually none


def session(path: Path, provider: str = "cpu") -> Any:
    """One thread, no spinning. Raises ExportError unless `provider` really serves."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    wanted = PROVIDERS[provider]
    try:
        made = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
    except Exception as error:  # ORT's errors have no common base
        raise _refused("load", error) from error
    if made.get_providers()[0] != wanted:
        raise ExportError("another provider serves", required=wanted, found=made.get_providers())
    return made


def run(made: Any, names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs by name, from flat inputs in the order of `names`."""
    feed = {name: t.detach().contiguous().numpy() for name, t in zip(names, tensors, strict=True)}
    taken = {i.name for i in made.get_inputs()}
    try:
        arrays = made.run(None, {n: v for n, v in feed.items() if n in taken})
    except Exception as error:
        raise _refused("run", error) from error
    return {o.name: torch.from_numpy(a) for o, a in zip(made.get_outputs(), arrays, strict=True)}


def _refused(what: str, error: Exception) -> ExportError:
    text = " ".join(str(error).split())
    if len(text) > 600:  # the reason comes last, after where in ORT and a signature in C++
        text = f"{text[:200]} ... {text[-400:]}"
    return ExportError(
        f"ONNX Runtime does not {what} the exported model",
        required="a graph that the installed onnxruntime takes",
        found=text,
        cure="update onnxruntime, or report this with the model's config",
    )


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """|a - e|_2 / |e|_2 over finite elements; infinite where shapes, integers or non-finite elements differ."""
    if expected.shape != actual.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual.to(expected.dtype)) else math.inf
    e, a = expected.double(), actual.double()
    # The least float stands for -inf in masked scores; its square would be infinite.
    finite = e.isfinite() & (e.abs() < 1e30)
    if not a[finite].isfinite().all():
        return math.inf
    norm, distance = float(e[finite].norm()), float((a[finite] - e[finite]).norm())
    return distance / norm if norm else distance


@dataclass(frozen=True)
class Probe:
    """A graph with extra outputs. sites: the Program's node -> names of codes, scale, zero point, or of a product."""

    path: Path
    sites: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, Tensor]

    @staticmethod
    def write(model: ir.Model, path: Path) -> Probe:
        """Save `model` with its sites' values among the outputs; `model` is as before."""
        import onnx_ir as ir

        outputs = list(model.graph.outputs)
        sites: dict[str, tuple[str, ...]] = {}
        constants: dict[str, Tensor] = {}
        for node in model.graph:
            if SITE not in node.metadata_props:
                continue
            taken = (*node.outputs, *node.inputs[1:3]) if node.op_type == "QuantizeLinear" else node.outputs
            values = [value for value in taken if value is not None]
            sites[node.metadata_props[SITE]] = tuple(str(value.name) for value in values)
            for value in values:
                if value.const_value is not None:
                    constants[str(value.name)] = torch.from_numpy(value.const_value.numpy().copy())
                elif value not in model.graph.outputs:
                    model.graph.outputs.append(value)
        # Above 2 GiB only as external data, and here it does not matter otherwise.
        ir.save(model, path, external_data=f"{path.name}.data")
        del model.graph.outputs[len(outputs) :]
        return Probe(path, sites, constants)

    def values(self, outputs: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """What each site has, from a run's outputs."""
        known = {**self.constants, **outputs}
        return {site: tuple(known[name] for name in names) for site, names in self.sites.items()}


class _OnOrtCodes(fx.Interpreter):
    """Runs a Program's graph with the values of a probe in place of its own roundings.

    step: the most that a code was off beyond rounding, in steps; product: the largest error of a MatMulNBits
    """

    def __init__(self, module: fx.GraphModule, sites: Mapping[str, tuple[Tensor, ...]]) -> None:
        super().__init__(module)
        self.sites, self.step, self.product = sites, 0.0, 0.0

    def run_node(self, n: fx.Node) -> Any:
        """As in fx, but for our operators where ORT's value is known or their own kernels do not serve."""
        ours = by_overload(n.target) if n.op == "call_function" else None
        form = None if ours is None else getattr(self, f"_{ours.name}", None)
        if form is None:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        return form(n, *args)

    def _quantize_dynamic(self, n: fx.Node, x: Tensor, granularity: str, bits: int = 8) -> tuple[Tensor, Tensor]:
        if n.name not in self.sites:  # merged with an equal one
            own: tuple[Tensor, Tensor] = super().run_node(n)
            return own
        codes, scale, zero = self.sites[n.name]
        _, unit = QUANTIZE_DYNAMIC.reference(x, granularity if scale.dim() else "tensor", bits)
        scale, zero = scale.reshape(unit.shape), zero.reshape(unit.shape)
        steps = codes.float() - zero.float()
        self._hold(x.float() / unit, steps * (scale / unit))
        return (steps.to(torch.int8) if bool((zero == SHIFT).all()) else steps), scale

    def _quantize_asymmetric(
        self, n: fx.Node, x: Tensor, granularity: str, bits: int = 8
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, unit, own_zero = QUANTIZE_ASYMMETRIC.reference(x, granularity, bits)
        if n.name not in self.sites:
            own: tuple[Tensor, Tensor, Tensor] = super().run_node(n)
            return own
        codes, scale, stored = self.sites[n.name]
        scale, zero = scale.reshape(unit.shape), stored.reshape(unit.shape).float() - SHIFT
        self._hold(own_zero * (unit / scale), zero)
        low = -(2 ** (bits - 1))
        taken = _clipped(codes, low, bits)
        self._hold(_within(x.float() / unit + zero, low, bits), taken)
        return taken, scale, zero

    def _quantize_static(self, n: fx.Node, x: Tensor, scale: Tensor, zero: Tensor | None, bits: int = 8) -> Tensor:
        if n.name not in self.sites:
            own: Tensor = super().run_node(n)
            return own
        low = -(2 ** (bits - 1)) + (zero is None and bits < 8)  # in 8 bits ORT has one code more than torch
        taken = _clipped(self.sites[n.name][0], low, bits)
        self._hold(_within(x.float() / scale + (0 if zero is None else zero), low, bits), taken)
        return taken

    def _hold(self, places: Tensor, codes: Tensor) -> None:
        if codes.numel():
            self.step = max(self.step, float((places - codes).abs().max()) - 0.5)

    def _qlinear(self, n: fx.Node, codes: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        weight, weight_scale, zero, bias, scheme, dtype = rest
        if codes.is_floating_point():
            w = dequantize_packed(weight, weight_scale, zero, Scheme.parse(scheme), codes.shape[-1])
            y = F.linear(codes, w) * scale
            return self._product(n, (y if bias is None else y + bias).to(dtype), bias)
        return self._product(n, super().run_node(n), bias)

    def _qlinear_weight_only(self, n: fx.Node, x: Tensor, *rest: Any) -> Tensor:
        return self._product(n, super().run_node(n), rest[3])

    def _product(self, n: fx.Node, y: Tensor, bias: Tensor | None) -> Tensor:
        """ORT's product and the Program's bias in place of `y`, where ORT rounds inside a product."""
        if n.name not in self.sites:
            return y
        (product,) = self.sites[n.name]
        taken = (product if bias is None else product + bias).to(y.dtype)
        self.product = max(self.product, relative_error(y, taken))
        return taken

    def _qconv2d(self, n: fx.Node, codes: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        if not codes.is_floating_point():
            own: Tensor = super().run_node(n)
            return own
        _, weight, weight_scale, bias, *window, dtype = rest
        w = weight.permute(0, 3, 1, 2).float() * (scale * weight_scale).reshape(-1, 1, 1, 1)
        y: Tensor = F.conv2d(codes, w, bias, *window)
        return y.to(dtype)


def _within(places: Tensor, low: int, bits: int) -> Tensor:
    return places.clamp(low, 2 ** (bits - 1) - 1)


def _clipped(codes: Tensor, low: int, bits: int) -> Tensor:
    """The Program's int8 codes, of ORT's before any clipping to fewer bits."""
    return _within(codes.to(torch.int16) - SHIFT, low, bits).to(torch.int8)


def check(
    path: Path, probe: Probe, program: Program, outputs: Sequence[str], batches: Sequence[Sequence[Tensor]]
) -> float:
    """Largest error of an output over `batches`, on ORT's codes.

    Raises ExportError naming the first output, or the kind of rounding, that is further off than its limit.
    """
    probed, shipped = session(probe.path), session(path)
    names, worst = [i.name for i in program.contract.inputs], 0.0
    for tensors in batches:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(names, tensors, strict=True))
        values = run(probed, names, tensors)
        interpreter = _OnOrtCodes(program.module, probe.values(values))
        with torch.no_grad():
            expected = interpreter.run(*tensors)
        _require("a quantisation", interpreter.step, STEP_LIMIT, shapes)
        _require("a MatMulNBits", interpreter.product, PRODUCT_LIMIT, shapes)
        actual = run(shipped, names, tensors)
        for name, given in zip(outputs, expected, strict=True):
            e = torch.as_tensor(given)  # a size comes as an int
            error = relative_error(e, values[name])
            worst = max(worst, error)
            _require(f"output {name!r}", error, OUTPUT_LIMIT, shapes)
            _require(f"output {name!r} without probes", relative_error(values[name], actual[name]), FREE_LIMIT, shapes)
    return worst


def _require(what: str, found: float, limit: float, shapes: str) -> None:
    if not found <= limit:
        raise ExportError(
            f"{what} of the exported model differs from the compressed model's",
            required=f"an error of at most {limit:g}",
            found=f"{found:.3g} on {shapes}",
            cure="report this with the model's config",
        )
