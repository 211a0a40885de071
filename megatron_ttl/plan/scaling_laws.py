"""Predict the loss of a model from its size and its tokens, by several published fits of one formula."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ttl.errors import ConfigError, closest, raise_faults

OTHER_TOKENIZER = ("the constants were fitted on English text with another tokenizer; a loss is per token, so slopes can be "
                   "compared and levels cannot")


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = A / N^alpha + B / D^beta + E: nats per token for N parameters and D tokens."""

    name: str
    a: float
    b: float
    e: float
    alpha: float
    beta: float
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        """Return nats per token."""
        return self.a / parameters ** self.alpha + self.b / tokens ** self.beta + self.e

    def optimal_tokens(self, parameters: float) -> float:
        """Return the tokens with which a model of this size is the best that its operations can buy.

        Operations go with N times D; where the loss is least for them, alpha A / N^alpha = beta B / D^beta.
        """
        return (self.beta * self.b * parameters ** self.alpha / (self.alpha * self.a)) ** (1 / self.beta)


_HOFFMANN = "Hoffmann et al. 2022, arXiv 2203.15556"
SCALING_LAWS = {law.name: law for law in (
    ScalingLaw("ttl-paper", 406.4, 410.7, 1.69, 0.32, 0.28, "Corrêa et al. 2024, arXiv 2401.16640, section 3.1"),
    ScalingLaw("hoffmann-text", 406.4, 410.7, 1.69, 0.34, 0.28, f"{_HOFFMANN}, as printed"),
    ScalingLaw("hoffmann-tex", 406.4, 410.7, 1.6934, 0.3392, 0.2849, f"{_HOFFMANN}, digits of its TeX source"),
    ScalingLaw("besiroglu", 482.01, 2085.43, 1.8172, 0.3478, 0.3658, "Besiroglu et al. 2024, arXiv 2404.10102"),
)}
"""By name. Optimal tokens hang on the third decimal of the exponents: show several, trust none alone."""


def choose_laws(names: Iterable[str]) -> list[ScalingLaw]:
    """Return the laws of these names, each once.

    Raises:
        ConfigError: a name is not known.
    """
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in SCALING_LAWS]
    raise_faults(ConfigError, (f"--constants: {name!r} is not known; it must be one of {', '.join(SCALING_LAWS)}; "
                               f"{closest(name, SCALING_LAWS) or 'correct it'}" for name in unknown))
    return [SCALING_LAWS[name] for name in wanted]
