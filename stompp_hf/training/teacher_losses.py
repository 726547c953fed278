"""What a teacher's loss is made of: the errors of predictions, of hidden states and of attention relations."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, logsigmoid, mse_loss

from ..errors import ConfigError
from ..method.class_divergence import class_divergence


def hidden_loss(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean squared error of hidden states, in units of the teacher's variance.

    Forward:  L = mean |h - h_T|^2 / mean |h_T - m|^2, m the mean of each feature over the batch; 0 for a perfect
              match, about 1 for a student that knows the means only. Padded positions are left out.
    Shapes:   student, teacher (batch, length, features) or (batch, channels, *size), any float dtype; real (batch,
              length), nonzero where a position is no padding. Returns a float32 scalar (float64 for float64).
    Source:   the loss is the field's; dividing by the variance, so that one weight fits all blocks, is this library's
              choice.
    """
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = student.to(wide), teacher.detach().to(wide)
    if real is not None and student.shape[:2] == real.shape and student.dim() == 3:
        student, teacher = student[real.bool()], teacher[real.bool()]
        others = [0]
    else:
        others = [0, *range(2, student.dim())] if student.dim() > 3 else list(range(student.dim() - 1))
    spread = (teacher - teacher.mean(others, keepdim=True)).square().mean()
    return mse_loss(student, teacher) / spread.clamp_min(torch.finfo(wide).tiny)


def logits_loss(
    student: Tensor, teacher: Tensor, kind: str, temperature: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Divergence of the student's predictions from the teacher's.

    Forward:  classes:    T^2 * KL(softmax(z_T / T) || softmax(z / T))
              regression: (z - z_T)^2
              labels (multi-label): T^2 * sum over labels of KL of two Bernoulli distributions
              each averaged over all leading dimensions, or summed with `weight` (0 leaves a position out)
    Shapes:   student, teacher (..., classes); weight: the leading dimensions. Returns a float32 scalar.
    Source:   Hinton et al. (2015); the kinds are this library's choice.
    """
    if kind == "regression":
        each = (student.float() - teacher.detach().float()).square().mean(-1)
    elif kind == "classes":
        each = class_divergence(student, teacher, temperature)
    else:
        z, target = student.float() / temperature, teacher.detach().float() / temperature
        yes = kl_div(logsigmoid(z), logsigmoid(target), reduction="none", log_target=True)
        no = kl_div(logsigmoid(-z), logsigmoid(-target), reduction="none", log_target=True)
        each = (yes + no).sum(-1) * temperature**2
    return each.mean() if weight is None else (each * weight).sum()


def relation_loss(student: Tensor, teacher: Tensor, heads: int, real: Tensor | None = None) -> Tensor:
    """Divergence of how the positions of a sequence relate to each other: MiniLM's loss, for one of q, k and v.

    Forward:  R = softmax(u u^T / sqrt(d)) of each head, over positions that are no padding
              L = mean over heads and real positions of KL(R_T || R)
    Shapes:   student (batch, length, heads * d), teacher (batch, length, heads * d_T), any float dtype; real (batch,
              length), nonzero where a position is no padding. Returns a float32 scalar (float64 for float64).
    Source:   Wang et al. (2021), MiniLMv2, whose relation heads split u evenly, so that d_T may be another d.
    """
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    known = real.bool() if real is not None and student.shape[:2] == real.shape else None

    def relations(u: Tensor) -> Tensor:
        u = u.to(wide).unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = u.matmul(u.transpose(-1, -2)) * u.shape[-1] ** -0.5
        if known is not None:
            scores = scores.masked_fill(~known[:, None, None], torch.finfo(wide).min / 2)
        return log_softmax(scores, -1)

    each = kl_div(relations(student), relations(teacher.detach()), reduction="none", log_target=True).sum(-1).mean(1)
    return each.mean() if known is None else (each * known).sum() / known.sum().clamp_min(1)


def check_weights(
    logits: float, hidden: float, task: float, temperature: float, relations: float = 0.0, embeddings: bool = False
) -> None:
    """Raise ConfigError for weights that are negative or teach nothing, or a temperature that is not positive."""
    for name, value in (("logits", logits), ("hidden", hidden), ("relations", relations), ("task", task)):
        if not 0.0 <= value < float("inf"):
            raise ConfigError(f"distillation: {name}={value!r} must be a weight of 0 or more, as in {name}=1.0.")
    if logits == hidden == relations == 0.0:
        raise ConfigError(
            "distillation: logits, hidden and relations are all 0: nothing to teach. Give one, as in hidden=1.0."
        )
    if embeddings and not hidden:
        raise ConfigError("distillation: embeddings=True is one of the hidden states; give them a weight: hidden=1.0.")
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(f"distillation: temperature={temperature!r} must be positive, as in temperature=1.0.")
