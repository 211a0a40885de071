"""The run file: everything that would change the loss curve, and how the run is kept, measured and reported.

Every class is strict (no silent conversion), frozen, and refuses unknown keys. The text under a field is its
documentation: `tools/show_config.py` prints it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_ttl.config.skips import ranges_of


class Section(BaseModel):
    """One table of the run file."""

    # Built when first used, and documented by config/describe.py when asked: importing this must be quick.
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class RunConfig(Section):
    """Where the run lives and from which seed it grows."""

    dir: str = Field(min_length=1)
    """Run folder: settings, metrics and checkpoints. Starting again with the same folder resumes."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Seed of the initial weights and of the data order."""
    start_from: str | None = None
    """Checkpoint folder of another run to branch from (weights, moments, position), e.g. for a WSD decay."""


class ModelConfig(Section):
    """A Llama-2 decoder, in Hugging Face's words."""

    hidden_size: int = Field(gt=0, le=2**24)
    """Width of the residual stream (h)."""
    intermediate_size: int = Field(gt=0, le=2**24)
    """Width of the SwiGLU (f)."""
    num_hidden_layers: int = Field(gt=0, le=512)
    """Number of blocks (L)."""
    num_attention_heads: int = Field(gt=0, le=2**16)
    """Query heads (n); each has hidden_size / n channels."""
    num_key_value_heads: int = Field(gt=0, le=2**16)
    """Key/value heads (k): k = n is multi-head, k < n grouped-query attention."""
    vocab_size: int = Field(gt=3, le=2**31 - 1)
    """Rows of the embedding and of the head (v); at least the tokenizer's size."""
    max_position_embeddings: int = Field(gt=0, le=2**31 - 1)
    """Longest sequence the exported model declares."""
    rms_norm_eps: float = Field(default=1e-6, ge=1e-38, lt=1)
    """Epsilon of RMSNorm; what is smaller is zero in fp32."""
    rope_theta: float = Field(default=10_000.0, gt=1)
    """Base of the rotary angles."""
    tie_word_embeddings: bool = False
    """Must be false: embedding and head are two weights, as in both papers."""
    init: Literal["normal", "tinyllama"] = "normal"
    """Initial weights: `normal` is N(0, 0.02) for all; `tinyllama` is that paper's depth-scaled rule."""

    @property
    def head_dim(self) -> int:
        """Channels per head (d)."""
        return self.hidden_size // self.num_attention_heads


class SourceConfig(Section):
    """One tokenised dataset."""

    prefix: str = Field(min_length=1)
    """Path without `.bin`/`.idx`."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the tokens, relative to the other sources; with stages these have the weights."""
    name: str | None = Field(default=None, min_length=1)
    """What stages call it; absent: the last part of the prefix."""


class StageConfig(Section):
    """Shares of the sources over a range of tokens."""

    until_tokens: int | None = Field(default=None, gt=0, lt=2**63)
    """Where it ends, in tokens from the first of the run, whole samples; only the last stage may leave it out."""
    weights: dict[str, float]
    """Share of the tokens of every source by name, relative to each other; 0 draws nothing of it."""


class DataConfig(Section):
    """What is read, by tokens."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Tokenised datasets and their weights."""
    stages: tuple[StageConfig, ...] = ()
    """Weights by ranges of tokens, one after another, each source going on where it stood; absent: one, by `weight`."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents become samples: their stream cut as it comes, or whole documents fitted together and padded."""
    document_mask: bool = False
    """Attention stays within documents, and positions begin anew with each; not with a pipeline."""


class TrainConfig(Section):
    """How much, and in which portions."""

    sequence_length: int = Field(gt=0)
    """Tokens per sample (s)."""
    tokens_per_step: int = Field(gt=0, le=2**40)
    """Tokens per optimizer step over all ranks; the accumulation is derived from it."""
    steps: int | None = Field(default=None, gt=0)
    """Length of the run in optimizer steps; exactly one of steps and tokens."""
    tokens: int | None = Field(default=None, gt=0)
    """Length of the run in tokens; a multiple of tokens_per_step."""
    gradient_clipping: float = Field(default=0.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""
    max_nonfinite_steps: int = Field(default=3, gt=0)
    """The run ends with so many steps in a row whose gradient is not finite; each of them moves no weight."""
    skip_steps: tuple[str, ...] = ()
    """Steps whose samples are left out, as "812" or "1200-1203"; a run that has taken them goes back to before."""


    def leaves_out(self, step: int) -> bool:
        """Return whether the samples of a step are left out."""
        return any(first <= step <= last for first, last in ranges_of(self.skip_steps))


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(gt=0, lt=1)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, ge=1e-38, le=1)
    """Added to the root of the second moment; what is smaller is zero in fp32."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of every matrix."""
    decay_norms: bool = False
    """Decay RMSNorm weights too, as both papers' code did."""
    decay_embeddings: bool = True
    """Decay the token embedding too."""


class ScheduleConfig(Section):
    """Learning rate over optimizer steps; the first step has number 1."""

    kind: Literal["cosine", "wsd", "constant"]
    """cosine to min_lr; warm-up, stable, decay; or constant after the warm-up."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Linear warm-up from 0, in steps; at most one of warmup_steps and warmup_tokens."""
    warmup_tokens: int | None = Field(default=None, ge=0)
    """Linear warm-up in tokens; a multiple of tokens_per_step."""
    decay_steps: int | None = Field(default=None, gt=0)
    """wsd only: length of the final decay in steps."""
    decay_tokens: int | None = Field(default=None, gt=0)
    """wsd only: length of the final decay in tokens."""
    decay_shape: Literal["linear", "sqrt"] = "sqrt"
    """wsd only: shape of the decay; sqrt is 1 - sqrt(progress)."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate of the last step; below optimizer.lr."""


class EvaluationConfig(Section):
    """How good the model is while it learns: loss on documents that training never sees, samples, signal tasks."""

    prefixes: tuple[str, ...] = ()
    """Held-out datasets, as `preprocess_data.py` writes them beside the training data."""
    every_steps: int | None = Field(default=None, gt=0)
    """Evaluate after every so many steps, and at the end; absent: never."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Read at most so many tokens of each prefix, always the same ones; absent: all."""
    samples: tuple[str, ...] = ()
    """Prompts that are continued at every evaluation, greedily and with a fixed seed; kept in samples.jsonl."""
    sample_tokens: int = Field(default=64, gt=0)
    """New tokens of each sample, unless the document ends before."""
    tasks: tuple[str, ...] = ()
    """Signal tasks: agreement_pt, cloze_pt, continuation_pt, or paths of `.jsonl` files of tools/make_packs.py."""
    task_items: int | None = Field(default=None, ge=2)
    """Only the first so many items of each task; absent: all."""


class CheckpointConfig(Section):
    """How often the run is kept, and which checkpoints stay."""

    every_steps: int = Field(gt=0)
    """Save after every so many steps, and at the end."""
    keep_last: int = Field(default=2, ge=1)
    """The newest so many stay."""
    keep_every_steps: int | None = Field(default=None, gt=0)
    """Those whose step is a multiple of this stay for good; absent: none."""
    asynchronous: bool = True
    """Write behind the training, from a copy in host memory: 12 bytes per parameter over all data-parallel ranks."""


class LogConfig(Section):
    """What is said while it runs; metrics.jsonl is always written."""

    every_steps: int = Field(default=10, gt=0)
    """One line and one row of metrics after every so many steps."""
    spike_sigmas: float | None = Field(default=6.0, gt=0)
    """Name a step whose loss is so many standard deviations above where the 128 before it led; never acted on."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Mirror to Weights & Biases; offline needs no network and is uploaded later with `wandb sync`."""
    wandb_project: str = "megatron_ttl"
    """Project name there."""
    tensorboard: bool = False
    """Mirror to event files under `tensorboard` in the run folder, for `tensorboard --logdir`."""


class EnergyConfig(Section):
    """Energy and CO2e, by CodeCarbon's offline tracker."""

    enabled: bool = True
    """Measure; a failure of the tracker never stops the run."""
    country_iso_code: str | None = Field(default=None, pattern="^[A-Z]{3}$")
    """Country whose electricity is used, ISO 3166 alpha-3 (BRA, PRT ...); required while enabled."""
    measure_power_s: float = Field(default=15.0, gt=0, le=86_400)
    """Seconds between two readings of the power."""


class RunFile(Section):
    """The whole run file."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig
    log: LogConfig = Field(default_factory=LogConfig)
    energy: EnergyConfig

    @property
    def total_steps(self) -> int:
        """Length of the run in optimizer steps."""
        return self.train.steps or (self.train.tokens or 0) // self.train.tokens_per_step

    @property
    def warmup_steps(self) -> int:
        """Length of the warm-up in optimizer steps."""
        return self.schedule.warmup_steps or (self.schedule.warmup_tokens or 0) // self.train.tokens_per_step

    @property
    def decay_steps(self) -> int:
        """Length of the wsd decay in optimizer steps; 0 for the other kinds."""
        return self.schedule.decay_steps or (self.schedule.decay_tokens or 0) // self.train.tokens_per_step

    @property
    def samples_per_step(self) -> int:
        """Sequences per optimizer step over all ranks."""
        return self.train.tokens_per_step // self.train.sequence_length
