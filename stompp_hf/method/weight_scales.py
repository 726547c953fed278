"""Where the scales of a binary weight stand: one for it all, one an output channel, or one a group along its input.

A scale a group is kept as (channels, groups), the others as (channels,) or (1,). Everybody who needs a scale in the
shape of the weight, or the sum of what each scale multiplies, asks here.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def scale_shape(kind: str, group_size: int, shape: Sequence[int], channel_dim: int) -> tuple[int, ...]:
    """Shape of the scales of a weight of `shape`, by the options weight_scale and group_size."""
    channels = shape[channel_dim]
    if kind == "group":
        return channels, math.ceil(_fan_in(shape, channel_dim) / group_size)
    return (channels if kind == "channel" else 1,)


def is_grouped(scale: Tensor) -> bool:
    """Whether there is a scale a group: such scales differ along the sums of a product, and stand inside it."""
    return scale.dim() > 1


def spread(scale: Tensor, group_size: int, count: int) -> Tensor:
    """(..., groups) to (..., count): each scale for `group_size` entries side by side, the last for what is left."""
    return scale.unsqueeze(-1).expand(*scale.shape, group_size).flatten(-2)[..., :count]


def over_weight(scale: Tensor, group_size: int, shape: Sequence[int], channel_dim: int) -> Tensor:
    """Scales in a shape that broadcasts over a weight of `shape`; autograd sums what comes back.

    The entries of an output channel lie as its bits do (see `SignBits`): those of nn.Linear and Conv1D along the input,
    those of a filter input channel by input channel, each row by row.
    """
    if not is_grouped(scale):
        return scale.reshape([-1 if dim == channel_dim else 1 for dim in range(len(shape))])
    row = [size for dim, size in enumerate(shape) if dim != channel_dim]
    rows = spread(scale, group_size, math.prod(row))
    return rows.reshape(-1, *row).movedim(0, channel_dim).contiguous()


def scaled(signs: Tensor, scale: Tensor, group_size: int, channel_dim: int) -> Tensor:
    """signs * over_weight(scale) of scales by groups, contiguous, in place of the signs where these are so.

    It takes no memory: spread scales would be as large as the weight, which packed layers unpack in each call.
    """
    signs = signs.reshape(-1).view(signs.shape)  # also where strides could be channels_last's: sums depend on them
    rows = signs.movedim(channel_dim, 0).flatten(1)  # a view
    groups = rows.shape[1] // group_size
    rows[:, : groups * group_size].unflatten(1, (groups, group_size)).mul_(scale[:, :groups, None])
    rows[:, groups * group_size :].mul_(scale[:, groups:])
    return signs


def group_sums(weight: Tensor, group_size: int, channel_dim: int) -> Tensor:
    """Sum of each group of a tensor like the weight, (channels, groups): the inverse way of `over_weight`."""
    rows = weight.movedim(channel_dim, 0).flatten(1)
    whole = F.pad(rows, (0, -rows.shape[1] % group_size))
    return whole.unflatten(1, (whole.shape[1] // group_size, group_size)).sum(-1)


def mean_sizes(weight: Tensor, kind: str, group_size: int, channel_dim: int) -> Tensor:
    """mean |w| over what shares a scale, in float64: where scales start."""
    size = weight.abs().to(torch.float64)
    if kind == "group":
        sums, fan_in = group_sums(size, group_size, channel_dim), _fan_in(size.shape, channel_dim)
        starts = torch.arange(sums.shape[1], device=sums.device) * group_size
        return sums / (fan_in - starts).clamp(max=group_size)
    others = [dim for dim in range(size.dim()) if dim != channel_dim or kind == "tensor"]
    return size.mean(others).reshape(-1)


def _fan_in(shape: Sequence[int], channel_dim: int) -> int:
    return math.prod(size for dim, size in enumerate(shape) if dim != channel_dim)
