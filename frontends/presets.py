"""Recipes by name. Each is what its source describes, as far as one library can keep to another's words."""

from __future__ import annotations

from .recipe import ActivationSettings, Calibration, QuantizeEntry, Recipe, WeightSettings

_W8 = WeightSettings(bits=8)
_A8_TOKEN = ActivationSettings(bits=8, range="dynamic")
_A8_STATIC = ActivationSettings(bits=8, kind="asymmetric", range="static")
_EMBEDDING_W8 = QuantizeEntry(operators=("embedding",), weight=_W8)

# Yao et al. 2022 (arXiv 2206.01861): weights per channel, activations per token on each call. No data needed.
ZEROQUANT_W8A8 = Recipe(
    name="zeroquant-w8a8",
    quantize=(QuantizeEntry(weight=_W8, activation=_A8_TOKEN), _EMBEDDING_W8),
)

# Weights alone: smaller everywhere, faster where memory is what limits.
W8A16 = Recipe(name="w8a16", quantize=(QuantizeEntry(weight=_W8), _EMBEDDING_W8))

W4A16_G128 = Recipe(
    name="w4a16-g128",
    quantize=(QuantizeEntry(operators=("linear", "embedding"), weight=WeightSettings(bits=4, group_size=128)),),
)

W4A8_G32 = Recipe(
    name="w4a8-g32",
    quantize=(
        QuantizeEntry(weight=WeightSettings(bits=4, group_size=32), activation=_A8_TOKEN),
        _EMBEDDING_W8,
    ),
)

# Ranges from data, one scale a tensor: what convolutions and QDQ runtimes want.
STATIC_W8A8 = Recipe(
    name="static-w8a8",
    quantize=(QuantizeEntry(operators=("linear", "conv2d"), weight=_W8, activation=_A8_STATIC), _EMBEDDING_W8),
    calibration=Calibration(method="mse"),
)

PRESETS: tuple[Recipe, ...] = (ZEROQUANT_W8A8, W8A16, W4A16_G128, W4A8_G32, STATIC_W8A8)
