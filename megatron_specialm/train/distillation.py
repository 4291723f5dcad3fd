"""Distillation, the objective of SLM-d: a student learns from the text and from a teacher's next-token distributions.

Per token, with p the teacher's and q the student's softmax of logits divided by a temperature (Hinton et al., arXiv 1503.02531,
whose factor temperature^2 keeps the gradient's size):

    (1 - alpha) * cross-entropy + alpha * temperature^2 * KL(p || q)        in nats, summed over the tokens that count

The teacher's distributions come from a forward pass beside the student's, or from a cache (`data/teacher.py`):

| teacher | the divergence of a token                                                                              |
|---------|--------------------------------------------------------------------------------------------------------|
| online  | exact                                                                                                  |
| exact   | exact, up to the rounding of the cache                                                                 |
| top-k   | over K + 1 events, the K ids and all others together. A lower bound of the exact divergence, so it is  |
|         | biased: the student's distribution within the others is not trained                                    |
| sampled | -H(p) + mean over draws of -log q. Value and gradient are unbiased over caches for any K (arXiv        |
|         | 2503.16870). One cache has the same draws in every epoch (`data/teacher.py`)                           |

Under tensor parallelism the vocabulary is sharded over processes. So each maximum and each sum of a softmax is all-reduced
over the shard's group: one number per token.

Legend: T positions, B sequences, V columns of this process's vocabulary shard, K cached entries per token, N = T * B.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.distributed as dist

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.data.teacher import ENTROPY, IDS, LOG_PROBABILITIES, TAIL, Kind
from megatron_specialm.engine.objective import TEACHER_LOGITS, DeviceBatch, VocabularyShard, cross_entropy

Teacher = Literal["online"] | Kind


class Distillation:
    """An `Objective`: cross-entropy plus the divergence from a teacher, whose outputs are extra inputs of the batch.

    Args:
        alpha: the weight of the divergence. With 0 the teacher's outputs are not used.
        temperature: of both softmaxes. A cache must have been written with the same one.

    Raises:
        ConfigError: alpha outside [0, 1], or a temperature that is not positive.
    """

    def __init__(self, *, alpha: float, temperature: float, teacher: Teacher) -> None:
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha {alpha}: the teacher's part of the loss is a number from 0 to 1")
        if temperature <= 0:
            raise ConfigError(f"temperature {temperature}: must be above 0; 1 leaves the teacher as it is")
        self._alpha, self._temperature, self._teacher = alpha, temperature, teacher

    def __call__(
        self, logits_TBV: torch.Tensor, batch: DeviceBatch, *, shard: VocabularyShard | None = None
    ) -> torch.Tensor:
        """See `Objective`."""
        from_text = cross_entropy(logits_TBV, batch, shard=shard)
        if self._alpha == 0:
            return from_text
        scores_NV = logits_TBV.flatten(0, 1).float() / self._temperature
        with torch.no_grad():
            divergences_N, gradient_NV = self._divergences(scores_NV, batch.extra_inputs, shard)
        divergences_N = _WithGradient.apply(scores_NV, divergences_N, gradient_NV)
        from_teacher = torch.dot(divergences_N, _flat(batch.mask))
        return (1 - self._alpha) * from_text + self._alpha * self._temperature**2 * from_teacher

    def _divergences(
        self, scores_NV: torch.Tensor, extra_inputs: Mapping[str, torch.Tensor], shard: VocabularyShard | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's divergence (N,), and its gradient by the scores (N, V)."""
        student = _Softmax.of(scores_NV, shard)
        if self._teacher == "online":
            return student.divergence_from(_flat(extra_inputs[TEACHER_LOGITS]).float() / self._temperature)
        if self._teacher == "exact":
            own_BTV = extra_inputs[LOG_PROBABILITIES][..., student.first : student.first + scores_NV.shape[1]]
            return student.divergence_from(_flat(own_BTV))
        ids_NK = _flat(extra_inputs[IDS]).long()
        if self._teacher == "top-k":
            weights_NK, rest_N = _flat(extra_inputs[LOG_PROBABILITIES]).exp(), _flat(extra_inputs[TAIL]).exp()
            some_N, some_NV = student.surprise_at(ids_NK, weights_NK)
            others_N, others_NV = student.surprise_at_others(ids_NK, rest_N)
            entropy_N = torch.special.entr(weights_NK).sum(1) + torch.special.entr(rest_N)
            return some_N + others_N - entropy_N, some_NV + others_NV
        weights_NK = torch.full_like(ids_NK, 1 / ids_NK.shape[1], dtype=torch.float32)
        some_N, some_NV = student.surprise_at(ids_NK, weights_NK)
        return some_N - _flat(extra_inputs[ENTROPY]), some_NV


class _Softmax(NamedTuple):
    """The softmax of scores whose columns may be sharded over processes. Methods return values (N,), reduced over the shard's
    group and so the same on all its processes, and gradients by the scores (N, V) of the local columns."""

    scores_NV: torch.Tensor
    log_sum_N: torch.Tensor  # log of the sum of exponentials over the full vocabulary
    probabilities_NV: torch.Tensor
    shard: VocabularyShard | None

    @classmethod
    def of(cls, scores_NV: torch.Tensor, shard: VocabularyShard | None) -> Self:
        """Columns at minus infinity are left out. If all columns are, log_sum is finite and very small."""
        rows, columns = scores_NV.shape
        # A shard may be all padding and have no columns at all.
        largest_N = scores_NV.amax(1) if columns else scores_NV.new_full((rows,), -torch.inf)
        _reduce(largest_N, dist.ReduceOp.MAX, shard)
        largest_N.clamp_(min=torch.finfo(largest_N.dtype).min)
        probabilities_NV = (scores_NV - largest_N[:, None]).exp_()
        sum_N = _reduce(probabilities_NV.sum(1), dist.ReduceOp.SUM, shard)
        sum_N.clamp_(min=torch.finfo(sum_N.dtype).tiny)
        probabilities_NV /= sum_N[:, None]
        return cls(scores_NV, sum_N.log() + largest_N, probabilities_NV, shard)

    @property
    def first(self) -> int:
        """The token id of the first local column."""
        return 0 if self.shard is None else self.shard.first

    def divergence_from(self, teacher_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL from the softmax of a teacher's scores."""
        teacher = _Softmax.of(teacher_NV, self.shard)
        apart_N = (teacher.probabilities_NV * (teacher_NV - self.scores_NV)).sum(1)
        apart_N = _reduce(apart_N, dist.ReduceOp.SUM, self.shard)
        return apart_N - teacher.log_sum_N + self.log_sum_N, self.probabilities_NV - teacher.probabilities_NV

    def surprise_at(self, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over K of weight * -log(probability). An id may occur more than once."""
        row, pick, column = self._own(ids_NK)
        weight = weights_NK[row, pick]
        surprise_N = torch.zeros_like(self.log_sum_N)
        surprise_N.index_add_(0, row, weight * (self.log_sum_N[row] - self.scores_NV[row, column]))
        gradient_NV = weights_NK.sum(1, keepdim=True) * self.probabilities_NV
        gradient_NV.index_put_((row, column), -weight, accumulate=True)
        return _reduce(surprise_N, dist.ReduceOp.SUM, self.shard), gradient_NV

    def surprise_at_others(self, ids_NK: torch.Tensor, weight_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weight * -log(total probability of all other ids). It is summed over the others, because 1 minus the sum over the ids
        loses a small remainder to rounding."""
        row, _, column = self._own(ids_NK)
        others_NV = self.scores_NV.clone()
        others_NV[row, column] = -torch.inf
        others = _Softmax.of(others_NV, self.shard)
        gradient_NV = weight_N[:, None] * (self.probabilities_NV - others.probabilities_NV)
        return weight_N * (self.log_sum_N - others.log_sum_N), gradient_NV

    def _own(self, ids_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The ids in this process's shard: their row, their index in K, and their local column."""
        columns_NK = ids_NK - self.first
        row, pick = ((columns_NK >= 0) & (columns_NK < self.scores_NV.shape[1])).nonzero(as_tuple=True)
        return row, pick, columns_NK[row, pick]


class _WithGradient(torch.autograd.Function):
    """Values (N,) of scores (N, V) whose gradient is already computed."""

    @staticmethod
    def forward(ctx: Any, scores_NV: torch.Tensor, values_N: torch.Tensor, gradient_NV: torch.Tensor) -> torch.Tensor:
        """Returns the values as a differentiable function of the scores."""
        ctx.save_for_backward(gradient_NV)
        return values_N.clone()

    @staticmethod
    def backward(ctx: Any, gradient_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        """The chain rule."""
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * gradient_N[:, None], None, None


def _reduce(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType, shard: VocabularyShard | None) -> torch.Tensor:
    """All-reduce in place over the process group that shards the vocabulary."""
    if shard is not None:
        dist.all_reduce(tensor, operation, shard.group)
    return tensor


def _flat(values_BT: torch.Tensor) -> torch.Tensor:
    """(B, T, ...) -> (N, ...), positions first like the logits."""
    return values_BT.transpose(0, 1).flatten(0, 1)
