"""Choose the next token: temperature, top-k, nucleus, or simply the most probable one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ttl.errors import CheckpointError, UserError, raise_faults


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the filters apply in the order of the fields."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token, ties to the lowest id."""
    top_k: int = 50
    """Only the k most probable tokens stay; 0 keeps all. Ties at the border go to the lowest ids."""
    top_p: float = 0.95
    """Only the fewest tokens whose probabilities reach p stay; 1 keeps all."""
    seed: int = 0
    """Seed of the draws."""

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0


def choose_sampling(temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
                    seed: int | None = None, greedy: bool = False, num_samples: int = 1,
                    max_new_tokens: int = 1) -> Sampling:
    """Check what a user asked for; None is what was left open, and becomes the default of `Sampling`.

    Raises:
        UserError: every value that makes no sense, and every pair that contradicts itself.
    """
    faults = _value_faults(temperature, top_k, top_p, seed)
    for name, count in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens)):
        if count < 1:
            faults.append(f"{name}: {count}; it must be at least 1; leave it out for the default")
    faults += _contradictions(temperature, top_k, top_p, greedy, num_samples)
    raise_faults(UserError, faults)
    given = {"temperature": 0.0 if greedy else temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    return Sampling(**{key: value for key, value in given.items() if value is not None})


def _value_faults(temperature: float | None, top_k: int | None, top_p: float | None,
                  seed: int | None) -> list[str]:
    faults = []
    if temperature is not None and not 0 <= temperature < math.inf:
        faults.append(f"temperature: {temperature:g}; it must be 0 (most probable token) or a positive "
                      "number; 0.7 to 1.0 is usual")
    if top_k is not None and top_k < 0:
        faults.append(f"top_k: {top_k}; it must be 0 (all tokens) or a positive count; 50 is usual")
    if top_p is not None and not 0 < top_p <= 1:
        faults.append(f"top_p: {top_p:g}; it must lie above 0 and at most at 1 (all tokens); 0.95 is usual")
    if seed is not None and not 0 <= seed < 2**63:
        faults.append(f"seed: {seed}; it must lie between 0 and 2^63 - 1; take a small number")
    return faults


def _contradictions(temperature: float | None, top_k: int | None, top_p: float | None, greedy: bool,
                    num_samples: int) -> list[str]:
    faults = []
    if greedy:
        others = {"temperature": temperature or None, "top_k": top_k, "top_p": top_p}
        faults += [f"greedy: given together with {name} {value:g}; greedy takes the most probable token and "
                   "draws nothing; leave out one of the two"
                   for name, value in others.items() if value is not None]
    if (greedy or temperature == 0) and num_samples > 1:
        how = "greedy" if greedy else "temperature 0"
        faults.append(f"num_samples: {num_samples} with {how}; all samples would be equal; ask for one, or "
                      "draw with a temperature above 0")
    return faults


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return what the next token is drawn from.

    Args:
        logits: [b, v], any float dtype.
        sampling: temperature above 0, top_k and top_p.

    Returns:
        [b, v] fp32, rows sum to 1; tokens filtered out have exactly 0.
        Source: Holtzman et al. 2020, section 3.1 (nucleus); over what top-k left, as Hugging Face does.
    """
    assert sampling.temperature > 0, "at temperature 0 nothing is drawn"
    wide = logits.float()
    # The maximum goes first: a tiny temperature must not push the best token to infinity.
    wide = (wide - wide.amax(-1, keepdim=True)) / sampling.temperature
    top_k = sampling.top_k if 0 < sampling.top_k < wide.shape[-1] else 0
    if not top_k and sampling.top_p == 1:
        return wide.softmax(-1)
    ranked, ids = _rank(wide, top_k)
    shares = ranked.softmax(-1)
    # A token stays while those before it fall short of p: the one that crosses p stays, the first always.
    before = shares.double().cumsum(-1) - shares
    shares = torch.where(before < sampling.top_p, shares, 0.0)
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.zeros_like(wide).scatter_(-1, ids, shares)


def _rank(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the top_k logits (0: all) best first, ties by id, and their ids: [b, v] -> [b, k] each."""
    if top_k:
        best, ids = logits.topk(top_k)
        if int((logits >= best[:, -1:]).sum()) == best.numel():  # else topk chose among equals as it liked
            ids = ids.sort(-1).values
            ranked, places = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
            return ranked, ids.gather(-1, places)
    ranked, ids = logits.sort(dim=-1, descending=True, stable=True)  # ten times slower than topk
    return ranked[:, : top_k or None], ids[:, : top_k or None]


def require_finite(logits: Tensor) -> None:
    """Refuse what a damaged model says.

    Raises:
        CheckpointError: something is no number.
    """
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError("model: its logits hold NaN or infinity; they must be numbers; the weights "
                              "are damaged or overflow in this dtype: try float32, or convert again")


class TokenChooser:
    """Choose one token per sequence and step; the same seed gives the same draws on every device.

    Sample i has its own generator, so it does not depend on how many samples are drawn beside it.

    Args:
        sampling: how.
        num_samples: sequences side by side (b).
    """

    def __init__(self, sampling: Sampling, num_samples: int = 1) -> None:
        self.sampling = sampling
        seeder = torch.Generator().manual_seed(sampling.seed)
        seeds = torch.randint(2**63 - 1, (num_samples,), generator=seeder)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]

    def __call__(self, logits: Tensor) -> Tensor:
        """[b, v] -> [b] int64 on the host

        Raises:
            CheckpointError: the model gave something that is no number.
        """
        require_finite(logits)
        if self.sampling.greedy:
            return logits.argmax(-1).cpu()  # the first, that is lowest, id among equals
        return self._draw(probabilities(logits, self.sampling).cpu().double())

    def _draw(self, shares: Tensor) -> Tensor:
        """Invert the distribution function at one uniform number per sequence: [b, v] -> [b]."""
        edges = shares.cumsum(-1)
        uniform = torch.stack([torch.rand(1, generator=one, dtype=torch.float64) for one in self._generators])
        # A number below 1 times the last edge is below it, also when rounded: a token with a share is hit.
        return torch.searchsorted(edges, uniform * edges[:, -1:], right=True)[:, 0]
