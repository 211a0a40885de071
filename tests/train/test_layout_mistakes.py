"""The parity matrix can fail: classic mistakes, patched in one at a time, each turn it red."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from layout_runs import Case, plain_loop, reference_of, train_case

from megatron_ttl.kernels.cross_entropy import IGNORED_LABEL
from megatron_ttl.parallel import loss, norm, shard, tensor
from megatron_ttl.parallel.loss import loss_sum
from megatron_ttl.testing import run_distributed
from megatron_ttl.train import deepspeed_drive, engine
from megatron_ttl.train.engine import Engine

RED = 1e-4  # ten times the matrix's bound


def forget_marks():
    """Sharded weights without DeepSpeed's mark: only the first rank's gradients enter the norm."""
    def cut_layer(*arguments):
        layer = real(*arguments)
        for parameter in layer.parameters():
            parameter.tensor_model_parallel = False
        return layer

    real = shard.cut_layer
    return mock.patch.object(shard, "cut_layer", cut_layer)


def skip_the_input_all_reduce():
    """The gradients of a column-parallel layer's input stay partial sums."""
    return mock.patch.object(tensor._Copy, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))


def skip_the_sum_over_outputs():
    return mock.patch.object(tensor._Sum, "forward", staticmethod(lambda ctx, x, parallel: x.view_as(x)))


def skip_the_reduction_of_shared_weights():
    """With sequence parallelism norms learn from a part of the tokens only."""
    return mock.patch.object(tensor.TensorParallel, "share", lambda self, weight: weight)


def average_the_averages():
    """Each micro batch's mean counts alike, however many labels it has."""
    def mean(self, logits, labels):
        return loss_sum(logits, labels, self._vocab_size, self._tensor_parallel) / (labels != IGNORED_LABEL).sum()

    return mock.patch.object(Engine, "_scaled_loss", mean)


def leave_the_padding_in_the_softmax():
    real = loss.loss_sum
    return mock.patch.object(engine, "loss_sum", lambda logits, labels, vocab_size, *rest: real(
        logits, labels, 10**6, *rest))


def norm_of_one_stage():
    """What DeepSpeed's stage 0 does: other stages' gradients are left out of the norm."""
    def local(parameters, clipping, mesh):
        return torch.nn.utils.clip_grad_norm_(list(parameters), clipping)

    assert norm.clip_gradients is deepspeed_drive.clip_gradients
    return mock.patch.object(deepspeed_drive, "clip_gradients", local)


def send_parts_between_stages():
    """DeepSpeed's default, which takes the tensor ranks' different tokens for parts of one tensor."""
    real = deepspeed_drive.deepspeed.initialize

    def initialize(config, **arguments):
        return real(config={**config, "pipeline": {}}, **arguments)

    return mock.patch.object(deepspeed_drive.deepspeed, "initialize", initialize)


MISTAKES = {
    forget_marks: Case(tensor=2), skip_the_input_all_reduce: Case(tensor=2), skip_the_sum_over_outputs: Case(tensor=2),
    skip_the_reduction_of_shared_weights: Case(tensor=2, sequence=True),
    average_the_averages: Case(data=2), leave_the_padding_in_the_softmax: Case(tensor=2, model="odd vocabulary"),
    norm_of_one_stage: Case(pipeline=2, stage=0),
    send_parts_between_stages: Case(tensor=2, pipeline=2, sequence=True),
}


def with_mistake(mesh, name, case):
    with next(mistake for mistake in MISTAKES if mistake.__name__ == name)():
        return train_case(mesh, case)[0]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_turns_the_matrix_red(mistake):
    """Without the mistake the same cases are green: they are rows of the matrix."""
    case = MISTAKES[mistake]
    curves = run_distributed(with_mistake, case.world_size, mistake.__name__, case)
    expected, _ = plain_loop(reference_of(case))
    assert (curves[0] - expected).abs().max() > RED
