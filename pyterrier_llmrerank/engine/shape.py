"""Describe the part of a model that a reranker runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Names the layers of a model to run, and the heads that read them.

    Args:
        cutoffs: layers at which a score is read, ascending.
        heads: index of the head for each cutoff.
        compress_layers: layers after which passages are pooled, as for
            :func:`~pyterrier_llmrerank.engine.decoder.decode`.
        compress_ratio: hidden states pooled into one; 1 is off.
        pad_id: reproduce the released code's padding with this id; None for scores without padding.
        prune: pairs of a cutoff and the number of candidates per query that continue after it.
        attn_implementation: the attention kernel, a name that
            :func:`~pyterrier_llmrerank.engine.attention_kernels.kernel_of` takes.
    """

    cutoffs: tuple[int, ...]
    heads: tuple[int, ...]
    compress_layers: tuple[int, ...] = ()
    compress_ratio: int = 1
    pad_id: int | None = None
    prune: tuple[tuple[int, int], ...] = ()
    attn_implementation: str | None = None

    @property
    def stages(self) -> list[tuple[int, ...]]:
        """The cutoffs in groups; all but the last end where candidates are dropped."""
        drops = [layer for layer, _ in self.prune]
        bounds = zip([0, *drops], [*drops, self.cutoffs[-1]], strict=True)
        return [tuple(cutoff for cutoff in self.cutoffs if above < cutoff <= last) for above, last in bounds]
