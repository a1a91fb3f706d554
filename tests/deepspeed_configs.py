"""Configurations in the shapes that DeepSpeed's examples have, made from their parts."""

from __future__ import annotations

from typing import Any

JSON = dict[str, Any]
ATTENTION, FFN, EMBEDDING = ["attention.self", "attention.output.dense"], ["intermediate"], ["word_embeddings"]

# The linears of tests.models' BERT.
LINEARS = ("query", "key", "value", "dense")


def group(modules: Any = ("attention",), related: Any = None, **params: Any) -> JSON:
    made: JSON = {"params": params}
    if modules is not None:
        made["modules"] = [*modules] if isinstance(modules, tuple) else modules
    return made if related is None else {**made, "related_modules": related}


def technique(groups: JSON | None = None, enabled: Any = True, **shared: Any) -> JSON:
    return {"shared_parameters": {"enabled": enabled, **shared}, "different_groups": groups or {}}


def weights(groups: JSON | None = None, enabled: bool = True, **shared: Any) -> JSON:
    return technique(groups or {"wq1": bits(8, 8)}, enabled, **shared)


def bits(start: Any, target: Any, period: Any = 0, modules: Any = ("attention",)) -> JSON:
    return group(modules, start_bits=start, target_bits=target, quantization_period=period)


def activations(modules: Any = ("attention",), enabled: bool = True, **shared: Any) -> JSON:
    shared = {"quantization_type": "symmetric", "range_calibration": "dynamic", "schedule_offset": 0} | shared
    return technique({"aq1": group(modules, bits=8)}, enabled, **shared)


def layers(kept: tuple[int, ...], enabled: bool = True, **more: Any) -> JSON:
    names = ["bert.pooler", "bert.embeddings", "classifier"]
    found = {"keep_number_layer": len(kept), "teacher_layer": [*kept], "other_module_name": names}
    return {"enabled": enabled, "module_name_prefix": "bert.encoder.layer", **found, **more}


def falling(start: int, target: int, period: int = 1, modules: Any = LINEARS, **shared: Any) -> JSON:
    """Weights of one group on MoQ's schedule."""
    return weights({"wq1": bits(start, target, period, modules)}, **shared)


def static(kind: str = "symmetric", modules: Any = LINEARS, **shared: Any) -> JSON:
    return activations(modules, quantization_type=kind, range_calibration="static", **shared)


def pruning_off() -> JSON:
    """What every BERT file has besides, with one group name twice."""
    query = [["self.query", "self.key", "self.value"]]
    row = group(("intermediate.dense",), [["layer.\\w+.output.dense"]], dense_ratio=0.5)
    head = group(("attention.output.dense",), query, dense_ratio=0.5)
    return {
        "sparse_pruning": technique({"sp1": group(dense_ratio=0.5)}, False, schedule_offset=2000, method="l1"),
        "row_pruning": technique({"rp1": row}, False, schedule_offset=2000, method="topk"),
        "head_pruning": technique({"rp1": head}, False, schedule_offset=2000, method="topk", num_heads=12),
    }


def engine(fp16: Any = False, **training: Any) -> JSON:
    made: JSON = {"train_batch_size": 32, "steps_per_print": 200, "zero_optimization": {"stage": 0}}
    made |= {"fp16": {"enabled": fp16}, "gradient_clipping": 1.0, "prescale_gradients": True}
    made |= {"wall_clock_breakdown": False, "optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.999]}}}
    return made | ({"compression_training": training} if training else {})


def mixed(ratio: float = 0.1, enabled: bool = False) -> JSON:
    return {"fp16_mixed_quantize": {"enabled": enabled, "quantize_change_ratio": ratio}}


def bert(fp16: bool, wq: JSON, aq: JSON, reduction: JSON | None = None) -> JSON:
    reduction = reduction or layers((2, 4, 6, 8, 10), False)
    return engine(fp16, layer_reduction=reduction, weight_quantization=wq, activation_quantization=aq, **pruning_off())


def gpt2(fp16: bool, ffn: int) -> JSON:
    groups = {"wq1": bits(8, 8, 0, ("attn.c_attn", "attn.c_proj")), "wq2": bits(ffn, ffn, 0, ("mlp.c_fc",))}
    wq = weights(groups, quantize_groups=64, quantize_weight_in_forward=not fp16, **mixed(1))
    return engine(fp16, weight_quantization=wq, activation_quantization=activations())


def xtc(fp16: bool, in_forward: bool, groups: int = 64, **more: Any) -> JSON:
    one = {"wq1": bits(1, 1, 0, (*ATTENTION, *FFN, *EMBEDDING))}
    wq = weights(one, quantize_groups=groups, quantize_weight_in_forward=in_forward, **mixed())
    return bert(fp16, wq, activations(), **more)


def channels() -> JSON:
    cp = group(("layer....conv1",), [["layer....conv2", "layer....bn1"]], dense_ratio=0.5)
    off = {"wq1": bits(12, 8, 50, ("conv1",)), "wq2": bits(12, 4, 50, ("conv1",))}
    made = {"weight_quantization": weights(off, False), "activation_quantization": activations(enabled=False)}
    sparse = {"sparse_pruning": pruning_off()["sparse_pruning"]}
    return engine(True, **made, **sparse, channel_pruning=technique({"cp1": cp}, schedule_offset=0, method="topk"))


def baseline() -> JSON:
    off = weights({"wq1": bits(1, 1)}, False, quantize_weight_in_forward=True)
    return bert(True, off, activations(("bert.encoder",), False))


QUANTIZED = {"weight_quantization", "activation_quantization"}
SIX = layers((1, 3, 5, 7, 9, 11))
W48 = {"wq1": bits(8, 8, 0, tuple(ATTENTION)), "wq2": bits(4, 4, 0, ("intermediate",))}
W12 = {"wq1": bits(1, 1), "wq2": bits(2, 2, 0, ("output.dense",))}
# A file's content, and its sections that are on.
SHAPES: dict[str, tuple[JSON, set[str]]] = {
    "bert baseline": (baseline(), set()),
    "W1A8 fp16": (xtc(True, False), QUANTIZED),
    "W1A8 fp32": (xtc(False, True), QUANTIZED),
    "W1or2A8": (bert(True, weights(W12), activations()), QUANTIZED),
    "XTC W1A8": (xtc(False, True, 1), QUANTIZED),
    "XTC layers": (bert(False, weights(enabled=False), activations(enabled=False), SIX), {"layer_reduction"}),
    "XTC layers W1A8": (
        xtc(False, True, 1, reduction=SIX),
        {"layer_reduction", *QUANTIZED},
    ),
    "ZeroQuant W8A8": (
        bert(False, weights(quantize_groups=48, quantize_weight_in_forward=True), activations()),
        QUANTIZED,
    ),
    "ZeroQuant W48A8 LKD": (
        bert(False, weights(W48), activations()),
        QUANTIZED,
    ),
    "no compression": (engine(), set()),
    "GPT-2 W8A8 fp16": (gpt2(True, 8), QUANTIZED),
    "GPT-2 W8A8 fp32": (gpt2(False, 8), QUANTIZED),
    "GPT-2 W4or8A8 fp16": (gpt2(True, 4), QUANTIZED),
    "GPT-2 W4or8A8 fp32": (gpt2(False, 4), QUANTIZED),
    "channel pruning": (channels(), {"channel_pruning"}),
}


def moq(bits: JSON | None = None, **more: Any) -> JSON:
    return {"quantize_training": {"enabled": True, "quantize_bits": bits or {"target_bits": 8}, **more}}
