"""Token compression: the body's hidden states, pooled in groups by the attention one token pays them.

The body's states are cut into groups of ``ratio`` neighbours (the last
group may be short) and each group becomes its weighted mean; prefix and suffix stay as they are, and the
sequence closes up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """How many tokens of each row are prefix, body and suffix, in that order; what follows is padding.

    Kept as host lists, so that shapes are known without asking the device.
    """

    prefix: list[int]
    body: list[int]
    suffix: list[int]

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return [sum(parts) for parts in zip(self.prefix, self.body, self.suffix, strict=True)]

    def compressed(self, ratio: int) -> Spans:
        """The spans after the bodies were pooled in groups of ``ratio``."""
        return Spans(self.prefix, [-(-body // ratio) for body in self.body], self.suffix)


def compress(hidden: Tensor, log_weights: Tensor, spans: Spans, ratio: int) -> tuple[Tensor, Spans]:
    """Pool the body of every row in groups of ``ratio`` consecutive tokens.

    Args:
        hidden: states, ``[batch, length, width]``.
        log_weights: logarithm of each token's weight, fp32 ``[batch, length]``; only differences within a
            group matter, since weights are normalised to 1 there. Logarithms, because a whole group may
            get so little attention that the weights themselves would vanish.
        spans: the rows' parts.
        ratio: tokens a group.

    Returns:
        The states ``[batch, longest row, width]`` and the spans they have now.
    """
    after = spans.compressed(ratio)
    device = hidden.device
    prefix = torch.tensor(spans.prefix, device=device)[:, None]
    body = torch.tensor(spans.body, device=device)[:, None]
    pooled = torch.tensor(after.body, device=device)[:, None]

    # Each new position reads up to `ratio` old ones: a group its members, any other position just one.
    position = torch.arange(max(after.lengths), device=device)[None]
    group = position - prefix
    in_body = (group >= 0) & (group < pooled)
    first = torch.where(group < 0, position, torch.where(in_body, prefix + group * ratio, position - pooled + body))
    size = torch.where(in_body, (body - group * ratio).clamp(max=ratio), 1)
    member = torch.arange(ratio, device=device)
    source = (first[..., None] + member).clamp(max=hidden.shape[1] - 1)
    absent = member >= size[..., None]

    rows = torch.arange(hidden.shape[0], device=device)[:, None, None]
    logits = log_weights[rows, source].masked_fill(~in_body[..., None], 0.0)  # padding's own could be anything
    weights = logits.masked_fill(absent, -torch.inf).softmax(-1)
    members = hidden[rows, source]
    return (weights[..., None] * members).sum(2).to(hidden.dtype), after
