"""The shape of a Matroyshka reranker: its depth, its width, and the candidates that a cascade keeps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .values import RATIOS, check_integer, check_items, check_layers, check_positive, refuse

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MatroyshkaShape:
    """Holds a shape: the arguments that name it, after their checks.

    Args:
        cutoff: one layer, several, or None for the deepest layer with a head.
        compress_layers: layers after which passages are pooled.
        compress_ratio: hidden states pooled into one; 1 is off.
        prune: a layer and the number of candidates that survive it, for each stage of a cascade.

    Layers count from 1, so that a number is also the number of layers that have run. In ``compress_layers``, 0 is
    allowed and has no effect.
    """

    cutoff: int | tuple[int, ...] | None
    compress_layers: tuple[int, ...]
    compress_ratio: int
    prune: tuple[tuple[int, int], ...]

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """The cutoffs, ascending; none if the model decides."""
        if self.cutoff is None:
            return ()
        return self.cutoff if isinstance(self.cutoff, tuple) else (self.cutoff,)

    @property
    def deepest(self) -> int | None:
        """The deepest cutoff; None if the model decides."""
        return self.cutoffs[-1] if self.cutoffs else None

    def pools(self, depth: int | None = None) -> bool:
        """Tell whether passages are pooled at least once in the first ``depth`` layers, or in any layer if None."""
        deepest = max(self.compress_layers, default=0) + 1 if depth is None else depth
        return self.compress_ratio > 1 and any(0 < layer < deepest for layer in self.compress_layers)

    def warn_without_effect(self) -> None:
        """Warn of compression that does nothing. It is not an error, because grids set one argument at a time."""
        if self.compress_ratio > 1 and not self.pools():
            logger.warning(
                "compress_ratio=%d has no effect without compress_layers (layers from 1 on)", self.compress_ratio
            )
        elif self.compress_ratio > 1 and not self.pools(self.deepest):
            logger.warning(
                "compress_layers=%s: no layer from 1 to below the cutoff, %d, so nothing is pooled; the token adapter "
                "is still used", list(self.compress_layers), self.deepest,
            )  # fmt: skip

    def check_stages(self, deepest: int | None) -> None:
        """Raise ValueError unless all stages of the cascade are shallower than the deepest cutoff, if that is known."""
        if deepest is not None and self.prune and (layer := self.prune[-1][0]) >= deepest:
            raise ValueError(f"prune={dict(self.prune)}: layer {layer} is not shallower than the cutoff, {deepest}.")

    def check_layers(self, model: str, with_head: Sequence[int], depth: int) -> tuple[int, ...]:
        """Check the shape against a model, and return its cutoffs.

        Args:
            model: the argument that names the model, and its value.
            with_head: its layers with a head, ascending.
            depth: its number of layers.

        Raises:
            ValueError: a layer has no head, or does not exist.
        """
        cutoffs = self.cutoffs or (with_head[-1],)
        self.check_stages(cutoffs[-1])
        for argument, value, layer in (
            *(("cutoff", cutoff, cutoff) for cutoff in cutoffs),
            *(("prune", dict(self.prune), layer) for layer, _ in self.prune),
        ):
            if layer not in with_head:
                raise ValueError(f"{argument}={value}: {model} has heads at layers {_in_words(with_head)}.")
        for layer in self.compress_layers:
            if layer >= depth:
                raise ValueError(
                    f"compress_layers={list(self.compress_layers)}: {model} has {depth} layers, so none runs after "
                    f"layer {layer}; allowed: 1 to {depth - 1}."
                )
        return cutoffs


def _in_words(layers: Sequence[int]) -> str:
    """Describe the layers with a head, for messages."""
    if len(layers) == 1:
        return f"{layers[0]} only; start_layer gives a plain language model more"
    step = layers[1] - layers[0]
    return f"{layers[0]} to {layers[-1]}" + (f" in steps of {step}" if step > 1 else "")


# -- checks of arguments


def check_cutoff(name: str, value: object) -> int | tuple[int, ...] | None:
    """Check cutoffs. Return one layer as an int, several as an ascending tuple."""
    if value is None:
        return None
    cutoffs = check_layers(name, value, 1)
    if not cutoffs:
        refuse(name, value, "a layer, several layers, or None")
    return cutoffs[0] if len(cutoffs) == 1 else cutoffs


def check_compress_ratio(name: str, value: object) -> int:
    """Check a ratio in which hidden states can be pooled."""
    if (ratio := check_positive(name, value)) not in RATIOS:
        refuse(name, value, "1, 2, 4, 8 (or a power of two up to 64)")
    return ratio


def check_prune(name: str, value: object) -> tuple[tuple[int, int], ...]:
    """Check a cascade, and return pairs of a layer and the number of its survivors, ascending by layer."""
    allowed = "layers and the number of candidates that survive each, {8: 50, 16: 20}"
    given = check_items(name, value, allowed)
    checked = sorted((check_integer(name, layer, allowed), check_integer(name, keep, allowed)) for layer, keep in given)
    if any(layer < 1 or keep < 1 for layer, keep in checked):
        refuse(name, value, f"{allowed}, integers of at least 1")
    if len(dict(checked)) < len(checked):
        raise ValueError(f"{name}={value!r} has a layer twice; allowed: {allowed}.")
    for (_, before), (layer, keep) in pairwise(checked):
        if keep > before:
            raise ValueError(f"{name}={value!r}: {keep} cannot survive layer {layer}: only {before} are left there.")
    return tuple(checked)
