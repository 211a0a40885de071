"""Say how likely token sequences are after others, without computing anything twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.evaluate.token_trees import Pair, Row, Trunk, arrange, shared_beginning
from megatron_ttl.generate.kv_cache import StaticCache, build_caches
from megatron_ttl.generate.sampling import require_finite
from megatron_ttl.kernels.documents import Documents, added_mask

_PASS_TOKENS = 8192
"""Tokens of a pass, padding included, unless one row alone has more."""
_WORTH_A_PASS = 1024
"""Tokens from which a pass is not filled up with rows of less than three quarters of its length."""
_MASK_NUMBERS = 2**24
"""Numbers in the mask of a pass, unless one row alone needs more: 64 MiB in fp32."""
_LOGIT_NUMBERS = 2**24
"""Logits that exist at a time: 64 MiB in fp32."""


class Scorer:
    """Log-likelihoods of continuations.

    Requests are sorted; what they share at their beginnings goes through the model once: a long common beginning becomes
    keys and values that all others build on, and a context with its choices is one row of tokens in which every token sees
    its own ancestors alone. Only tokens that predict a continuation reach the head, and a token that several continuations
    are asked of reaches it once.

    Memory beside the weights: one cache of positions plus at most two rows (2 L k d numbers a token), 64 MiB of logits
    and of masks, and the activations of 8,192 tokens; a single sequence that needs more gets it.

    Padding is on the right and no real token sees it, so a result does not depend on what else is asked, but for the
    rounding of sums of another shape.

    Args:
        model: layers as `build_model` gives them; may be in training.
        config: of the model.
        batch: rows of a pass, where rows are short enough.

    Attributes:
        tokens_asked: tokens of all sequences so far, as if each were run alone.
        tokens_run: tokens that went through the model, padding included.
    """

    def __init__(self, model: nn.Sequential, config: ModelConfig, batch: int = 32) -> None:
        assert batch > 0
        self.model, self.config, self.batch = model, config, batch
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self.tokens_asked = self.tokens_run = 0

    # Not inference_mode: the blocks keep their rotary tables, and training could not use a table made there.
    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], progress: Callable[[int], None] | None = None) -> list[tuple[float, bool]]:
        """Return the log-probability in nats of every continuation, and whether each of its tokens is the most probable.

        Among equals the token with the lowest id is the most probable one.

        Args:
            pairs: context and continuation, ids, both not empty; together at most one more than the model has positions.
            progress: receives the number of requests answered after each pass.

        Raises:
            CheckpointError: the model says something that is no number.
        """
        positions = self.config.max_position_embeddings
        for context, continuation in pairs:
            assert context and continuation and len(context) + len(continuation) <= positions + 1, "see Args"
        self.tokens_asked += sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
        nats, greedy, answered = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool), 0
        for rows, caches in self._passes(arrange(pairs)):
            hidden, width = self._hidden(rows, caches)
            answered += self._collect(hidden, width, rows, nats, greedy)
            if progress:
                progress(answered)
        return list(zip(nats.tolist(), greedy.tolist(), strict=True))

    def _passes(self, trunks: list[Trunk]) -> Iterator[tuple[list[Row], list[StaticCache] | None]]:
        """Yield rows that go through the model together, with keys and values of the trunk they stand on."""
        standing = np.empty(0, np.int32)
        caches: list[StaticCache] | None = None
        for trunk in trunks:
            if not len(trunk.ids):
                yield from ((rows, None) for rows in self._batches(trunk.rows))
                continue
            if caches is None:
                most = max(len(other.ids) + row.count for other in trunks if len(other.ids) for row in other.rows)
                caches = build_caches(self.config, most, self._device, self._dtype)
            kept = shared_beginning(standing, trunk.ids)
            for cache in caches:
                cache.shorten(kept)
            self._through_blocks(trunk.ids[None, kept:], caches)
            standing = trunk.ids
            for row in trunk.rows:
                yield [row], caches
                for cache in caches:
                    cache.shorten(len(trunk.ids))

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Yield rows of like length side by side, the longest first: what does not fit shows at once."""
        gathered: list[Row] = []
        for row in sorted(rows, key=lambda row: -row.count):
            longest = gathered[0].count if gathered else row.count
            most = min(self.batch, _PASS_TOKENS // longest, _MASK_NUMBERS // longest**2)
            wasteful = row.count < 0.75 * longest and len(gathered) * longest >= _WORTH_A_PASS
            if gathered and (len(gathered) >= most or wasteful):
                yield gathered
                gathered = []
            gathered.append(row)
        if gathered:
            yield gathered

    def _hidden(self, rows: list[Row], caches: list[StaticCache] | None) -> tuple[Tensor, int]:
        """Return what goes into the head, [b * s, h], and the s of the longest row."""
        width = max(row.count for row in rows)
        ids = np.zeros((len(rows), width), dtype=np.int32)
        for place, row in enumerate(rows):
            ids[place, : row.count] = row.ids
        documents = None if all(row.is_chain for row in rows) else self._documents(rows, width)
        return self._through_blocks(ids, caches, documents).flatten(0, 1), width

    def _documents(self, rows: list[Row], width: int) -> Documents:
        """Return depths and mask of rows; the tokens that fill them up see themselves, for a query must see something."""
        depths = np.zeros((len(rows), width), dtype=np.int64)
        sees = np.zeros((len(rows), width, rows[0].trunk + width), dtype=bool)
        sees[:, :, : rows[0].trunk] = True
        sees[:, np.arange(width), rows[0].trunk + np.arange(width)] = True
        for place, row in enumerate(rows):
            depths[place, : row.count] = row.depths
            sees[place, : row.count, row.trunk : row.trunk + row.count] = row.sees()
        return (torch.from_numpy(depths).to(self._device),
                added_mask(torch.from_numpy(sees).to(self._device), self._dtype))

    def _through_blocks(self, ids: np.ndarray, caches: list[StaticCache] | None,
                        documents: Documents | None = None) -> Tensor:
        """Run all layers but the head: [b, s] -> [b, s, h]."""
        self.tokens_run += ids.size
        embedding, *blocks, _ = self.model
        x = embedding(torch.from_numpy(ids.astype(np.int64)).to(self._device))
        for place, block in enumerate(blocks):
            x = block(x, caches[place] if caches else None, documents)
        return x

    def _collect(self, hidden: Tensor, width: int, rows: list[Row], nats: np.ndarray, greedy: np.ndarray) -> int:
        """Add what each token of each continuation has to its request; return how many requests were answered."""
        asked = [(request, place * width + nodes, targets)
                 for place, row in enumerate(rows) for request, nodes, targets in row.asked()]
        requests = np.repeat([request for request, _, _ in asked], [len(targets) for _, _, targets in asked])
        targets = np.concatenate([targets for _, _, targets in asked]).astype(np.int64)
        nodes, which = np.unique(np.concatenate([nodes for _, nodes, _ in asked]), return_inverse=True)
        order = np.argsort(which, kind="stable")
        step = max(_LOGIT_NUMBERS // self.config.vocab_size, 1)
        for start in range(0, len(nodes), step):
            logits = self.model[-1](hidden[torch.from_numpy(nodes[start : start + step]).to(hidden.device)]).float()
            require_finite(logits)
            chosen = order[slice(*np.searchsorted(which[order], (start, start + step)))]
            node = torch.from_numpy(which[chosen] - start).to(hidden.device)
            target = torch.from_numpy(targets[chosen]).to(hidden.device)
            shares = logits[node, target] - logits.logsumexp(-1)[node]
            np.add.at(nats, requests[chosen], shares.double().cpu().numpy())
            np.logical_and.at(greedy, requests[chosen], (logits.argmax(-1)[node] == target).cpu().numpy())
        return len(asked)
