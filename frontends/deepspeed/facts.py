"""What became of each key in DeepSpeed 0.19.6 and becomes of it here, as one table.

A fact applies to the keys its pattern matches, where its condition holds. The first that applies gives the verdict
and what the key becomes, the notes of all that apply are read together: so special cases stand before general ones.
Keys are shortened: `weight_quantization.rounding` for a shared parameter, `weight_quantization.group.bits` for what
a group says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from .config import DeepSpeedConfig
from .sections import MAX_FACTOR, Group, QuantizeTraining, WeightGroup, WeightQuantization

Verdict = Literal["maps", "differs", "no effect in DeepSpeed", "not yet", "rejected", "engine"]
MAPS: Final = "maps"
DIFFERS: Final = "differs"
NO_EFFECT: Final = "no effect in DeepSpeed"
NOT_YET: Final = "not yet"

# Notes that several keys share.
OFFSET = "not given: 1000 by DeepSpeed's code, though its documentation says 0"
CRASH = "DeepSpeed crashed"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One key of an enabled section: its value, given or default, and what stands around it."""

    key: str
    value: Any
    given: bool
    config: DeepSpeedConfig
    group: Group | None = None
    total_steps: int | None = None

    @property
    def weights(self) -> WeightQuantization:
        """The section, for keys of weight_quantization."""
        assert self.config.weight_quantization is not None
        return self.config.weight_quantization

    @property
    def bits(self) -> WeightGroup:
        """The group, for keys of a group of weight_quantization."""
        assert isinstance(self.group, WeightGroup)
        return self.group

    @property
    def most_bits(self) -> int:
        """With which a weight is ever quantised."""
        falling = not self.weights.quantize_weight_in_forward
        return max((group.start_bits if falling else group.target_bits for group in self.weights.groups), default=16)

    @property
    def training(self) -> QuantizeTraining:
        """The section, for keys of quantize_training."""
        assert self.config.legacy is not None
        return self.config.legacy


@dataclass(frozen=True)
class Fact:
    """absent: whether it is worth telling of a key that was not given, or of none but those."""

    key: str
    verdict: Verdict
    note: str | Callable[[Site], str] = ""
    to: str = ""  # what the key becomes; {value} stands for its value
    when: Callable[[Site], bool] = lambda site: True
    absent: Literal["silent", "told", "only"] = "silent"

    def applies(self, site: Site) -> bool:
        """Whether it is about this key as it stands."""
        if site.given:
            return self.absent != "only" and self.when(site)
        return self.absent != "silent" and self.when(site)


def in_forward(site: Site) -> bool:
    """Weights are fake-quantised in the forward, not overwritten after each step (MoQ)."""
    return site.weights.quantize_weight_in_forward


def by_kernel(site: Site) -> bool:
    """MoQ with DeepSpeed's CUDA kernel."""
    return site.weights.quantizer_kernel and not in_forward(site)


def falls(site: Site) -> bool:
    """A group of weights that starts with more bits than it ends with."""
    return site.bits.start_bits != site.bits.target_bits


def drops_bits(site: Site) -> bool:
    """A group whose bits fall while training, also in DeepSpeed."""
    return falls(site) and not in_forward(site)


def _listed(steps: tuple[int, ...], offset: int, start_bits: int, total: int | None) -> str:
    at = [offset + step for step in steps]
    text = f"one bit goes at each of the steps {', '.join(map(str, at))}"
    if total is not None:
        done = sum(step <= total for step in at)
        reached = "all" if done == len(at) else str(done)
        text += f"; {reached} of {len(at)} lie within {total} steps, which end at {start_bits - done} bits"
    return text


def moq_drops(site: Site) -> str:
    """The steps at which a group's bits fall."""
    group, offset = site.bits, site.weights.schedule_offset
    text = _listed(group.drops(), offset, group.start_bits, site.total_steps)
    if site.config.eigenvalue:
        last = offset + group.drops(MAX_FACTOR)[-1]
        text += (
            f"; with eigenvalues the periods grow up to {MAX_FACTOR} times per drop, the last drop at {last} at most"
        )
    return f"thresholds double, the documentation's 'every n steps' is wrong: {text}"


def legacy_drops(site: Site) -> str:
    """The same for quantize_training, in steps."""
    training, bits = site.training, site.training.quantize_bits
    text = f"counted quantised tensors, {training.tensors} per step: {training.period:g} steps, doubling; "
    if not training.drops():
        return text + "no bits to drop"
    text += _listed(training.drops(), training.schedule_offset, bits.start_bits, site.total_steps)
    if training.eigenvalue:
        last = training.schedule_offset + training.drops(MAX_FACTOR)[-1]
        text += f"; eigenvalues delay the last to {last} at most"
    return text


def legacy_offset(site: Site) -> str:
    """schedule_offset of quantize_training, in steps."""
    return f"counted quantised tensors, {site.training.tensors} per step: {site.training.schedule_offset} steps"


def is_star(site: Site) -> bool:
    """DeepSpeed's own word for all modules."""
    return site.value in ("*", ("*",))


def is_symmetric(site: Site) -> bool:
    """A kind."""
    return bool(site.value == "symmetric")


def is_asymmetric(site: Site) -> bool:
    """A kind."""
    return bool(site.value == "asymmetric")


def is_snip(site: Site) -> bool:
    """Sparse pruning by snip_momentum."""
    return site.config.sparse_pruning is not None and site.config.sparse_pruning.method == "snip_momentum"


def of_snip(site: Site) -> bool:
    """A key of sparse pruning by snip_momentum."""
    return site.key.startswith("sparse_pruning.") and is_snip(site)


def by_blocks(site: Site) -> bool:
    """Blocks of whole channels, which sparse pruning does not have here."""
    return "channel" in site.value


def has_pairs(site: Site) -> bool:
    """A group of pruning with two pairs or more of modules and related modules."""
    return site.group is not None and len(site.group.related or ()) > 1
