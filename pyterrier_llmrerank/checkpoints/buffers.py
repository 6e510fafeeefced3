"""Buffers that transformers computes now, and that its older releases stored beside the weights."""

from __future__ import annotations

import math
import re

from .tensors import TensorFiles

#: Rotary angles.
ROTARY = re.compile(
    r"(.*\.)?((maybe_)?rotary(_pos)?(_emb)?\.((original_)?inv_freq|(cos|sin)_cached)|(attn|attention)\.embed_positions)"
)

#: Causal masks, and the value that they put in place of a hidden score.
MASK = re.compile(r"(.*\.)?(attn|attention)\.(bias|causal_mask)")
HIDDEN = re.compile(r"(.*\.)?(attn|attention)\.masked_bias")


def is_computed(name: str, files: TensorFiles) -> bool:
    """Tell whether a tensor is a buffer that transformers computes now.

    Args:
        name: the name of the tensor, or a part of it.
        files: the files that hold the tensor.
    """
    if ROTARY.fullmatch(name):
        return True
    same = (file for file in files if f".{file}".endswith(f".{name}") or f".{name}".endswith(f".{file}"))
    shapes = [files.shape(file) for file in same]
    if HIDDEN.fullmatch(name):
        return all(math.prod(shape) == 1 for shape in shapes)
    masks = all(len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] for shape in shapes)
    return MASK.fullmatch(name) is not None and masks
