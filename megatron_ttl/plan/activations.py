"""What the backward pass needs: bytes that autograd keeps per token, operation by operation, and what a backward adds.

Counted for the code of `model/`, `kernels/` and `parallel/`; a test counts what autograd really keeps and compares. No
torch: `--dry-run` must be quick.

Letters: h hidden, q = heads x head size, kv = key/value heads x head size, f intermediate, v vocabulary, n heads, all on
one tensor rank; w bytes of a number. With every operation in its CUDA form a block keeps

    w (4 h + (q + 2 kv) + q + 3 f) + 8 + 4 n        nothing recomputed
    w (2 h + (q + 2 kv) + q + 2 f) + 8 + 4 n        "selective"
    w h                                             "full"

bytes per token: both residual sums, the inputs of both packed products, the packed projection, the attention's output and
logsumexp, gate and up, the product of both; and the statistics of two norms. It is the accounting of Korthikanti et al.
2022, section 4, for SwiGLU, grouped heads, fused attention and no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.parallel.plan import Layout, padded_vocabulary

FP32 = 4
IDS = 8
"""Bytes of a token id or a label."""
Paths = Mapping[str, str]
"""Operation -> implementation, by the names of the machine profile's section "kernels"; never "auto"."""

FUSED: Paths = {"rms_norm": "cuda", "rotary": "cuda", "swiglu": "cuda", "cross_entropy": "cuda", "adamw": "cuda",
                "attention": "flash"}
"""What runs on a GPU where our kernels can be compiled."""
PLAIN: Paths = {"rms_norm": "torch", "rotary": "torch", "swiglu": "torch", "cross_entropy": "torch",
                "adamw": "torch", "attention": "flash"}
"""What runs on a GPU where they cannot."""
ON_A_CPU: Paths = {**PLAIN, "rms_norm": "reference"}
"""PyTorch has no fused RMSNorm there: the formula is written out in fp32."""


@dataclass(frozen=True)
class Token:
    """How many numbers one token has on one tensor rank, and their bytes."""

    number: int
    """Bytes of an activation: w."""
    hidden: int
    residual: float
    """h, or its share where sequence parallelism shares out the residual stream."""
    queries: int
    keys: int
    wide: int
    vocabulary: int
    heads: int
    head_dim: int
    sequence: int
    """Tokens of a sample."""

    @property
    def packed(self) -> int:
        """q + 2 kv."""
        return self.queries + 2 * self.keys


def token_of(model: ModelConfig, layout: Layout, number: int, sequence: int) -> Token:
    """Return the sizes that a token has on each rank of a layout."""
    cut = layout.tensor
    return Token(number, model.hidden_size, model.hidden_size / (cut if layout.sequence else 1),
                 model.num_attention_heads * model.head_dim // cut, model.num_key_value_heads * model.head_dim // cut,
                 model.intermediate_size // cut, padded_vocabulary(model, cut) // cut, model.num_attention_heads // cut,
                 model.head_dim, sequence)


def _fused_norm(x: Token) -> float:
    return x.residual * x.number + FP32 * x.residual / x.hidden  # what was normed; 1 / sqrt(mean square)


def _output_and_logsumexp(x: Token) -> float:
    return x.queries * x.number + FP32 * x.heads


KEPT: dict[str, dict[str, Callable[[Token], float]]] = {
    "rms_norm": {"cuda": _fused_norm, "torch": _fused_norm, "apex": _fused_norm,
                 # in fp32: what was normed, and once more times its statistic
                 "reference": lambda x: 2 * FP32 * x.residual + FP32 * x.residual / x.hidden},
    "rotary": {"cuda": lambda x: x.packed * x.number,  # turned in place
               # values are a view of the packed projection, queries and keys of a second tensor
               "torch": lambda x: (x.packed + x.queries + x.keys) * x.number},
    "attention": dict.fromkeys(("cudnn", "flash", "flash_attn"), _output_and_logsumexp) | {
        # takes no groups: keys and values are repeated
        "efficient": lambda x: _output_and_logsumexp(x) + (2 * x.queries * x.number if x.keys != x.queries else 0),
        # the written-out formula: fp32 copies of all three, and a row of probabilities per head
        "math": lambda x: x.queries * (x.number + 3 * FP32) + FP32 * x.heads * x.sequence},
    "swiglu": {"cuda": lambda x: 2 * x.wide * x.number, "torch": lambda x: 3 * x.wide * x.number},  # and silu(gate)
    # the gradient takes the place of the logits; PyTorch keeps fp32 log-probabilities beside them
    "cross_entropy": {"cuda": lambda x: 0.0, "torch": lambda x: FP32 * x.vocabulary},
}
"""Operation -> implementation -> bytes per token that it keeps for its backward pass.

Logits are counted by themselves: `logits`. Inputs of matrix products that no other operation keeps are in `kept_by_block`.
"""


def kept_by_block(x: Token, paths: Paths, recompute: str, documents: bool = False) -> float:
    """Return the bytes per token that a block keeps between its forward and its backward pass.

    Args:
        x: sizes on a rank.
        paths: which implementations run.
        recompute: "none", "selective" or "full".
        documents: attention stays within documents: every block looks up the angles of each token, 4 bytes per channel
            of a head. The mask is shared by all blocks and not counted here.
    """
    if recompute == "full":
        return x.residual * x.number
    angles = FP32 * x.head_dim if documents else 0
    attention = KEPT["rotary"][paths["rotary"]](x) + KEPT["attention"][paths["attention"]](x) + angles
    if recompute == "selective":
        # A fused norm also adds, and keeps what it needs; otherwise the sum alone is kept, and the norm done again.
        fused = paths["rms_norm"] in ("cuda", "apex") and x.residual == x.hidden
        sums = 2 * (_fused_norm(x) if fused else x.residual * x.number)
        return attention + sums + 2 * x.wide * x.number
    norms = 2 * KEPT["rms_norm"][paths["rms_norm"]](x)
    products = (2 * x.hidden + x.wide) * x.number  # inputs of qkv, of gate-up, of down; o's is the attention's output
    return norms + attention + KEPT["swiglu"][paths["swiglu"]](x) + products


def kept_by_head(x: Token, paths: Paths, cut: bool = False) -> float:
    """Return the bytes per token that the final norm, the head and the loss keep, but the logits.

    Args:
        x, paths: as for `kept_by_block`.
        cut: the vocabulary is shared out over ranks: largest logit and sum of exponentials are kept instead.
    """
    norm = KEPT["rms_norm"][paths["rms_norm"]](x) + x.hidden * x.number
    return norm + (2 * FP32 if cut else KEPT["cross_entropy"][paths["cross_entropy"]](x)) + IDS


def logits(x: Token) -> float:
    """Return the bytes of a token's logits."""
    return x.vocabulary * x.number


def added_by_loss(x: Token, paths: Paths) -> float:
    """Return the most bytes per token that loss and its gradient take beyond logits and `kept_by_head`.

    PyTorch's: the gradients of the log-probabilities and of the fp32 logits. Cut over ranks: two fp32 copies.
    """
    return 0.0 if paths["cross_entropy"] == "cuda" else 2 * FP32 * x.vocabulary


def gradient_of_logits(x: Token, paths: Paths) -> float:
    """Return the bytes per token of the gradient of the logits, where it does not take their place."""
    return 0.0 if paths["cross_entropy"] == "cuda" else logits(x)


def added_by_block(x: Token, paths: Paths, recompute: str, documents: bool = False) -> float:
    """Return the most bytes per token that the backward pass of a block takes beyond what blocks keep.

    The gradient of its output lives all the time. In the feed-forward half, the gradient of gate and up is made while
    that of their product is there, which took the place of the product; what is recomputed comes on top. In the
    attention's half there are the gradients of output, queries, keys and values, and inside of the fused kernels an fp32
    sum of the queries' gradients and, of grouped heads, the others' gradients per query head, while everything of the
    other half is free again.

    Args:
        x, paths, recompute, documents: as for `kept_by_block`.
    """
    whole, kept = kept_by_block(x, paths, "none", documents), kept_by_block(x, paths, recompute, documents)
    swiglu = KEPT["swiglu"][paths["swiglu"]](x)
    forgotten = {"none": 0.0, "selective": swiglu - x.wide * x.number, "full": whole - kept}[recompute]
    gradient = x.residual * x.number
    feed_forward = forgotten + 2 * x.wide * x.number
    half = KEPT["rms_norm"][paths["rms_norm"]](x) + (x.hidden + x.wide) * x.number + swiglu
    left = (kept - 2 * x.wide * x.number - gradient if recompute == "selective" else whole - half) - kept
    if paths["attention"] == "math":
        inside = 2 * FP32 * x.heads * x.sequence + 3 * FP32 * x.queries
    else:
        inside = FP32 * x.queries + (2 * x.queries * x.number if x.keys != x.queries else 0)
    mixing = left + (2 * x.queries + 2 * x.keys) * x.number + inside
    return gradient + max(feed_forward, mixing)
