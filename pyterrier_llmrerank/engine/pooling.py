"""Compress passages between two layers: pool neighbouring hidden states of the body into one.

The body's states are cut into groups of ``ratio`` neighbours (the last group may be shorter). Each group becomes its
mean, weighted by the attention that the pair's last token pays each state. Prefix and suffix stay::

    before   A A b b b b b S        ratio 2
    after    A A B B B S            B: a pooled group; positions close up
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .packing import Packing, on_device


class Pooling:
    """Pools the bodies of a packed row.

    Args:
        before: the packing of the row.
        ratio: tokens of a body pooled into one.
        device: the device of the hidden states.
    """

    def __init__(self, before: Packing, ratio: int, device: torch.device) -> None:
        after = before.pooled(ratio)
        # Each new token reads up to `ratio` old ones: a group its members, any other token just one.
        prefix, body, pooled = (
            sizes[after.pair_of_token][:, None] for sizes in (before.prefix, before.body, after.body)
        )
        position = after.positions[:, None]
        group, member = position - prefix, np.arange(ratio)
        in_body = (group >= 0) & (group < pooled)
        start = np.where(group < 0, position, np.where(in_body, prefix + group * ratio, position - pooled + body))
        size = np.where(in_body, (body - group * ratio).clip(max=ratio), 1)
        absent = member >= size
        source = np.where(absent, start, start + member)
        #: The packing of the pooled row.
        self.after = after
        self._members = on_device(before.places[after.pair_of_token[:, None], source], device)
        self._pair = on_device(after.pair_of_token[:, None], device)
        self._source = on_device(source, device)
        self._single = on_device(~in_body, device)
        self._absent = on_device(absent, device)

    def __call__(self, hidden: Tensor, log_weights: Tensor) -> Tensor:
        """Pool the states of a packed row.

        Args:
            hidden: ``[tokens, width]``.
            log_weights: logarithm of each token's weight, fp32 ``[pairs, longest]``. Only differences within a group
                matter, because weights are normalised to 1 there. They are logarithms because a whole group may get so
                little attention that its weights would vanish.

        Returns:
            The pooled states, ``[tokens after, width]``.
        """
        logits = log_weights[self._pair, self._source].masked_fill(self._single, 0.0)
        weights = logits.masked_fill(self._absent, -torch.inf).softmax(-1)
        return (weights[..., None] * hidden[self._members]).sum(1).to(hidden.dtype)
