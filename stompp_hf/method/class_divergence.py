"""Divergence of two predictions over classes, in chunks: over a vocabulary, whole softmaxes take gigabytes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div, log_softmax

CHUNK = 2**22
"""Logits that are looked at together."""


class _ClassDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        each = student.new_empty(len(student), dtype=torch.float32)
        for part in _chunks(student):
            z, target = _log_softmaxes(student[part], teacher[part], temperature)
            each[part] = kl_div(z, target, reduction="none", log_target=True).sum(-1)
        return each.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        student, teacher = ctx.saved_tensors
        grad_student = torch.empty_like(student)
        for part in _chunks(student):
            z, target = _log_softmaxes(student[part], teacher[part], ctx.temperature)
            grad_student[part] = z.exp_().sub_(target.exp_()).mul_((grad[part] * ctx.temperature)[:, None])
        return grad_student, None, None


def _chunks(rows: Tensor) -> Iterator[slice]:
    size = max(CHUNK // max(rows.shape[-1], 1), 1)
    return (slice(begin, begin + size) for begin in range(0, len(rows), size))


def _log_softmaxes(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return log_softmax(student.float() / temperature, -1), log_softmax(teacher.float() / temperature, -1)


def class_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence of each position's prediction from the teacher's, without a softmax of more than a few of them.

    Forward:  d = T^2 * KL(softmax(z_T / T) || softmax(z / T))
    Backward: dL/dz = g * T * (softmax(z / T) - softmax(z_T / T)); both softmaxes are computed anew. The teacher gets
              none.
    Shapes:   student, teacher (..., classes), any float dtype. Returns the leading dimensions, float32.
    Source:   Hinton et al. (2015); the chunks are this library's.
    """
    rows = _ClassDivergence.apply(student.flatten(0, -2), teacher.detach().flatten(0, -2), temperature)
    return rows.unflatten(0, student.shape[:-1])  # type: ignore[no-any-return]
