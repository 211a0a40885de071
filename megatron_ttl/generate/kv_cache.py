"""Keys and values of the tokens already seen, one cache per block, in memory taken once."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ttl.config.schema import ModelConfig


class StaticCache:
    """Hold up to `capacity` tokens of one block; appending copies only what is new.

    Args:
        batch: sequences side by side.
        kv_heads: key/value heads of the block (k).
        capacity: tokens that fit.
        head_dim: channels per head (d).
        device, dtype: of the keys and values to come.
    """

    def __init__(self, batch: int, kv_heads: int, capacity: int, head_dim: int, device: torch.device | str,
                 dtype: torch.dtype) -> None:
        self._keys = torch.empty(batch, kv_heads, capacity, head_dim, device=device, dtype=dtype)
        self._values = torch.empty_like(self._keys)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self._keys.shape[2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add [b, k, s_new, d] keys and values; return views of all so far, [b, k, s_total, d]."""
        end = self.length + key.shape[2]
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        self._keys[:, :, self.length : end] = key
        self._values[:, :, self.length : end] = value
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def shorten(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        assert 0 <= length <= self.length
        self.length = length

    def repeated(self, count: int, capacity: int | None = None) -> StaticCache:
        """Return a cache with `count` copies of this one sequence, for what may follow it; None: of the same capacity."""
        batch, kv_heads, own, head_dim = self._keys.shape
        assert batch == 1, f"one sequence can be repeated, not {batch}"
        other = StaticCache(count, kv_heads, capacity or own, head_dim, self._keys.device, self._keys.dtype)
        other.append(self._keys[:, :, : self.length], self._values[:, :, : self.length])
        return other


def build_caches(config: ModelConfig, capacity: int, device: torch.device | str, dtype: torch.dtype,
                 batch: int = 1) -> list[StaticCache]:
    """Build one empty cache per block of the model."""
    return [StaticCache(batch, config.num_key_value_heads, capacity, config.head_dim, device, dtype)
            for _ in range(config.num_hidden_layers)]
