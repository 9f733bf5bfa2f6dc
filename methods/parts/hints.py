"""What a user is told of a method's settings (`Hints`), and the rules that several methods share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from methods.parts.contract import RunFacts

LOWER_RATE = "a lower optim.base_lr or a longer warm-up"
LARGER_BATCH = "a larger train.global_batch_size"


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What a user is told of a method's settings. Nothing of it changes the training.

    Attributes:
        chance_loss: the loss of a method that has learned nothing, and its formula, e.g. `(ln K, "ln K")`; None = there is none.
        chance_parts: the same for metrics that are parts of the loss, by name, where the whole has no such value.
        uniform_metric: a metric that is 1, too, while the loss stays at chance; None = the loss alone tells.
        remedies: what to try when the loss stays at chance or embeddings collapse, one phrase that begins with "try".
        warnings: sentences on settings that will work badly together.
        settling_steps: steps from which on a run's scores can be compared: a queue is full, prototypes begin to learn.
    """

    chance_loss: tuple[float, str] | None = None
    chance_parts: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    uniform_metric: str | None = None
    remedies: str = f"try {LOWER_RATE}"
    warnings: tuple[str, ...] = ()
    settling_steps: tuple[float, ...] = ()


def one_of(*remedies: str) -> str:
    """Return "try A, B, or C"; empty remedies are left out."""
    *first, last = filter(None, remedies)
    return f"try {', '.join(first)}, or {last}" if first else f"try {last}"


def told(*sentences: str | bool) -> tuple[str, ...]:
    """Return the sentences that apply, of `condition and sentence` each."""
    return tuple(sentence for sentence in sentences if isinstance(sentence, str) and sentence)


# ---------------------------------------------------------------------------- rules: a sentence, or "" where it does not apply


def many_clusters(key: str, value: object, clusters: int, facts: RunFacts, *, images_each: int, advised: int) -> str:
    """Warn of fewer than `images_each` training images to a cluster; `advised` images to each are advised."""
    images = facts.num_images
    if images is None or clusters * images_each <= images:
        return ""
    return f"{key}={value} for {images} images; use {max(2, images // advised)} or fewer"


def queue_beyond_images(key: str, length: int, facts: RunFacts, effect: str) -> str:
    """Warn of a queue with more rows than there are training images."""
    images = facts.num_images
    if images is None or length <= images:
        return ""
    return f"{key}={length} for {images} images: {effect}; use {max(1, images // 2)} or fewer"


def queue_filled_late(key: str, length: int, facts: RunFacts, effect: str) -> str:
    """Warn of a queue that is filled in the second half of the run."""
    filling, steps = math.ceil(length / facts.global_batch_size), facts.total_steps
    return f"{key}={length} is filled after {filling} steps of {steps}, {effect}" if filling > steps // 2 else ""


def slow_average(momentum: float, facts: RunFacts, network: str) -> str:
    """Warn of a moving average over more than a third of the run."""
    steps = facts.total_steps
    if momentum == 1 or steps * (1 - momentum) >= 3:
        return ""
    return (
        f"method.momentum={momentum:g} averages over {1 / (1 - momentum):.0f} steps, and the run has {steps}: the {network} "
        f"hardly moves; use {max(0.9, round(1 - 10 / steps, 3)):g} or less"
    )


def blunt_targets(network: str, temperature: float, predictions: float, remedy: str) -> str:
    """Warn of targets whose temperature is not below that of the predictions."""
    if temperature < predictions:
        return ""
    return (
        f"a {network} temperature of {temperature:g} is not below method.temperature={predictions:g}: the targets are no sharper "
        f"than the predictions and become uniform; use {remedy}"
    )


def faster_average(momentum: float) -> str:
    """Return a remedy: an average that moves three times as far in a step; "" where the momentum is near a limit."""
    return f"method.momentum={1 - (1 - momentum) * 3:g}" if 0.7 < momentum < 1 else ""
