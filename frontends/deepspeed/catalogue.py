"""The facts: what became of each key in DeepSpeed 0.19.6, and what becomes of it here. How they are read: `facts`."""

from __future__ import annotations

from .facts import (
    CRASH,
    DIFFERS,
    MAPS,
    NO_EFFECT,
    OFFSET,
    Fact,
    by_kernel,
    drops_bits,
    falls,
    in_forward,
    is_asymmetric,
    is_star,
    is_symmetric,
    legacy_drops,
    legacy_offset,
    moq_drops,
    of_snip,
)
from .structures import PRUNING

_SCALE = (
    "DeepSpeed: scale max|x| / 2^(B-1), which clips +max by one step and is not idempotent; here "
    "max|x| / (2^(B-1) - 1), so +max is representable. A group of zeros gave NaN, here zeros"
)
_ZERO_POINT = (
    "DeepSpeed: scale (max - min) / 2^B and a zero point on its grid, which clips the maximum; here (max - min) / "
    "(2^B - 1) with an integer zero point and 0 in range. A constant group gave NaN"
)
_SILENT = "DeepSpeed reads it only where weights are overwritten after each step, not in the forward"
_ROWS = "scales per tensor, not a group size; in the forward an embedding has one scale per row whatever this says"
_MOQ = "without fp16 DeepSpeed refuses this mode; here it works in any precision"
_LEGACY = "DeepSpeed 0.19.6 ignores quantize_training"
_ABSENT_MODULES = "stands for everything, as documented; in DeepSpeed it raised re.error"


_WQ, _AQ, _QT = "weight_quantization", "activation_quantization", "quantize_training"

WEIGHTS: tuple[Fact, ...] = (
    Fact(f"{_WQ}.enabled", MAPS, to="quantised weights"),
    Fact(f"{_WQ}.quantize_weight_in_forward", MAPS, to="simulated in the forward", when=lambda s: s.value),
    Fact(
        f"{_WQ}.quantize_weight_in_forward",
        DIFFERS,
        _MOQ,
        "bits on a schedule (MoQ)",
        when=lambda s: not s.value and not s.config.fp16,
        absent="told",
    ),
    Fact(f"{_WQ}.quantize_weight_in_forward", MAPS, to="bits on a schedule (MoQ)", when=lambda s: not s.value),
    Fact(f"{_WQ}.quantizer_kernel", NO_EFFECT, _SILENT, when=lambda s: s.value and in_forward(s)),
    Fact(
        f"{_WQ}.quantizer_kernel",
        DIFFERS,
        "DeepSpeed's kernel rounds stochastically even where rounding is 'nearest', computes other scales than its "
        "Python code and refuses 1 and 2 bits; here all backends agree on the codes",
        "nothing: kernels are chosen by the operator",
        when=by_kernel,
    ),
    Fact(f"{_WQ}.quantizer_kernel", MAPS, to="nothing: kernels are chosen by the operator"),
    Fact(
        f"{_WQ}.schedule_offset",
        DIFFERS,
        f"{CRASH} on convolutions before the offset (an attribute is set only when it is reached)",
        "start at step {value}",
        when=lambda s: in_forward(s) and s.value > 0,
    ),
    Fact(f"{_WQ}.schedule_offset", MAPS, "active after that many steps", "start at step {value}"),
    Fact(f"{_WQ}.quantize_groups", MAPS, _ROWS, "scales per weight: {value}", absent="told"),
    Fact(f"{_WQ}.quantize_verbose", NO_EFFECT, _SILENT, when=lambda s: s.value and in_forward(s)),
    Fact(f"{_WQ}.quantize_verbose", MAPS, "", "the schedule's log"),
    Fact(
        f"{_WQ}.quantization_type",
        DIFFERS,
        _SCALE,
        "kind symmetric",
        when=lambda s: is_symmetric(s) and s.most_bits > 2,
        absent="told",
    ),
    Fact(f"{_WQ}.quantization_type", MAPS, to="kind binary or ternary", when=is_symmetric),
    Fact(f"{_WQ}.quantization_type", DIFFERS, _ZERO_POINT, "kind asymmetric", when=is_asymmetric),
    Fact(
        f"{_WQ}.rounding",
        NO_EFFECT,
        f"{_SILENT}: it rounded to nearest",
        when=lambda s: s.value == "stochastic" and in_forward(s),
    ),
    Fact(
        f"{_WQ}.rounding",
        DIFFERS,
        "with quantizer_kernel 'nearest' was really stochastic: the kernel's wrapper compares it with "
        "'nearest_neighbor'; here nearest is nearest",
        "rounding nearest",
        when=lambda s: s.value == "nearest" and by_kernel(s),
        absent="told",
    ),
    Fact(
        f"{_WQ}.rounding",
        DIFFERS,
        "DeepSpeed asserts that 1 and 2 bits round to nearest",
        "rounding stochastic above 2 bits",
        when=lambda s: (
            s.value == "stochastic" and not in_forward(s) and any(g.target_bits <= 2 for g in s.weights.groups)
        ),
    ),
    Fact(f"{_WQ}.rounding", MAPS, "", "rounding {value}"),
    Fact(f"{_WQ}.fp16_mixed_quantize.*", NO_EFFECT, _SILENT, when=in_forward),
    Fact(
        f"{_WQ}.fp16_mixed_quantize.enabled",
        DIFFERS,
        f"{CRASH} on it together with quantizer_kernel",
        "mixing with the unquantised weight",
        when=by_kernel,
    ),
    Fact(f"{_WQ}.fp16_mixed_quantize.enabled", MAPS, "", "mixing with the unquantised weight"),
    Fact(
        f"{_WQ}.fp16_mixed_quantize.quantize_change_ratio",
        MAPS,
        "the unquantised share falls by it each step, from 1 and again from 1 after a drop; the documentation says "
        "the reverse",
        "share - {value} per step",
    ),
    Fact(
        f"{_WQ}.group.start_bits",
        NO_EFFECT,
        lambda s: (
            f"DeepSpeed quantises to target_bits, {s.bits.target_bits}, at once when in the forward, and so does this; "
            "dwindle can also lower the bits on a schedule there"
        ),
        when=lambda s: in_forward(s) and falls(s),
    ),
    Fact(f"{_WQ}.group.start_bits", MAPS, to="start bits {value}"),
    Fact(
        f"{_WQ}.group.target_bits",
        DIFFERS,
        "1 bit: DeepSpeed's sign(0) is 0, a third value; here sign(0) = +1",
        "binary weights",
        when=lambda s: s.value == 1,
    ),
    Fact(f"{_WQ}.group.target_bits", MAPS, "2 bits: three values", "ternary weights", when=lambda s: s.value == 2),
    Fact(
        f"{_WQ}.group.target_bits",
        MAPS,
        "in the forward DeepSpeed asserts at least 4 bits for convolutions",
        "target bits {value}",
        when=lambda s: s.value < 4 and in_forward(s),
    ),
    Fact(f"{_WQ}.group.target_bits", MAPS, to="target bits {value}"),
    Fact(
        f"{_WQ}.group.quantization_period",
        NO_EFFECT,
        "there are no bits to drop: the target is used at once",
        when=lambda s: not drops_bits(s),
    ),
    Fact(f"{_WQ}.group.quantization_period", MAPS, moq_drops, "period {value}", drops_bits, "told"),
    Fact(f"{_WQ}.group.related_modules", NO_EFFECT, "only pruning has related modules"),
)

ACTIVATIONS: tuple[Fact, ...] = (
    Fact(f"{_AQ}.enabled", MAPS, "a module that is an embedding crashed DeepSpeed", "quantised inputs"),
    Fact(f"{_AQ}.quantization_type", DIFFERS, _SCALE, "kind symmetric", when=is_symmetric, absent="told"),
    Fact(f"{_AQ}.quantization_type", DIFFERS, _ZERO_POINT, "kind asymmetric", when=is_asymmetric),
    Fact(
        f"{_AQ}.range_calibration",
        MAPS,
        "not given: dynamic by DeepSpeed's code, though its documentation says static",
        "range {value}",
        absent="only",
    ),
    Fact(
        f"{_AQ}.range_calibration",
        MAPS,
        "one range per token for linears, per image for convolutions",
        "range dynamic",
        when=lambda s: s.value == "dynamic",
        absent="told",
    ),
    Fact(
        f"{_AQ}.range_calibration",
        DIFFERS,
        "a moving average with momentum 0.95, one range per tensor; without a training step it gave NaN",
        "range static",
        when=lambda s: s.value == "static",
    ),
    Fact(f"{_AQ}.group.bits", MAPS, to="bits {value}"),
    Fact(f"{_AQ}.group.related_modules", NO_EFFECT, "only pruning has related modules"),
    Fact(f"{_AQ}.schedule_offset", MAPS, OFFSET, "start at step {value}", absent="only"),
    Fact(f"{_AQ}.schedule_offset", MAPS, to="start at step {value}"),
)

LAYERS: tuple[Fact, ...] = (
    Fact(
        "layer_reduction.keep_number_layer",
        NO_EFFECT,
        "DeepSpeed's library never reads it; here it must be the length of teacher_layer",
    ),
    Fact(
        "layer_reduction.module_name_prefix",
        MAPS,
        "the model to compress is the teacher; init_compression copies layers to a student",
        "depth row {value}",
    ),
    Fact("layer_reduction.teacher_layer", MAPS, to="depth keep_layers {value}"),
    Fact(
        "layer_reduction.other_module_name", DIFFERS, "in a recipe nothing is copied: all other modules are the model's"
    ),
    Fact("layer_reduction.*", MAPS, to="depth"),
)

MODULES: tuple[Fact, ...] = (
    Fact("*.group.modules", DIFFERS, _ABSENT_MODULES, "everything", is_star),
    Fact("*.group.modules", DIFFERS, f"not given: {_ABSENT_MODULES}", "everything", absent="only"),
    Fact(
        "*.group.modules",
        DIFFERS,
        "one regular expression; DeepSpeed took a string letter by letter",
        "modules",
        when=lambda s: isinstance(s.value, str) and not is_star(s),
    ),
    Fact(
        "*.group.modules",
        MAPS,
        "searched for anywhere in the names; DeepSpeed skipped transformers' Conv1D without a word",
        "modules",
    ),
    Fact("*.different_groups", MAPS, "no groups: nothing is chosen", when=lambda s: not of_snip(s)),
)

LEGACY: tuple[Fact, ...] = (
    Fact(f"{_QT}.enabled", DIFFERS, f"{_LEGACY}; here it is read as in 2021", "bits on a schedule (MoQ)"),
    Fact(f"{_QT}.quantize_schedule.quantize_period", DIFFERS, legacy_drops, "steps", absent="told"),
    Fact(
        f"{_QT}.quantize_schedule.quantize_period",
        DIFFERS,
        "not given: 1000 by the code of 2021, though the tutorial says 100",
        absent="only",
    ),
    Fact(f"{_QT}.quantize_schedule.schedule_offset", DIFFERS, legacy_offset, "steps", absent="told"),
    Fact(
        f"{_QT}.quantize_schedule.schedule_offset",
        DIFFERS,
        "not given: 1000 by the code of 2021, though the tutorial says 100",
        absent="only",
    ),
    Fact(f"{_QT}.quantize_bits.start_bits", MAPS, to="start bits {value}"),
    Fact(
        f"{_QT}.quantize_bits.target_bits", DIFFERS, "sign(0) = +1 here", "binary weights", when=lambda s: s.value == 1
    ),
    Fact(f"{_QT}.quantize_bits.target_bits", MAPS, to="target bits {value}"),
    Fact(f"{_QT}.quantize_algo.q_type", DIFFERS, _SCALE, "kind symmetric", when=is_symmetric, absent="told"),
    Fact(f"{_QT}.quantize_algo.q_type", DIFFERS, _ZERO_POINT, "kind asymmetric", is_asymmetric),
    Fact(f"{_QT}.quantize_algo.rounding", MAPS, to="rounding {value}"),
    Fact(f"{_QT}.quantize_groups", MAPS, "scales per tensor, not a group size", "scales per weight: {value}"),
    Fact(f"{_QT}.quantizer_kernel", MAPS, to="nothing: kernels are chosen by the operator"),
    Fact(f"{_QT}.quantize_verbose", MAPS, to="the schedule's log"),
    Fact(f"{_QT}.fp16_mixed_quantize.enabled", MAPS, to="mixing with the unquantised weight"),
    Fact(f"{_QT}.fp16_mixed_quantize.quantize_change_ratio", MAPS, to="share - {value} per step"),
    Fact(
        f"{_QT}.eigenvalue.enabled",
        DIFFERS,
        "DeepSpeed 0.19.6 never reaches it, asserts that it is off, and crashes behind that; it works here",
        "drops by sensitivity",
    ),
    Fact(f"{_QT}.eigenvalue.layer_name", MAPS, to="blocks under {value}"),
    Fact(f"{_QT}.eigenvalue.layer_num", MAPS, to="{value} blocks"),
    Fact(f"{_QT}.eigenvalue.gas_boundary_resolution", MAPS, to="again every {value} steps"),
    Fact(f"{_QT}.eigenvalue.*", MAPS, to="power iteration"),
)

FACTS: tuple[Fact, ...] = (*WEIGHTS, *ACTIVATIONS, *MODULES, *PRUNING, *LAYERS, *LEGACY)
