"""The model to train: the decoder of inference, with its heads as modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.families import FAMILIES
from ..checkpoints.locate import without_revision
from ..engine.decoder import Decoder, decode
from ..engine.packing import PackedPairs
from ..engine.weights import build_decoder, fill


class Head(nn.Module):
    """Scores the hidden states of a layer; the module has the name that the original program gives a head."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear_head = nn.Linear(weight.shape[-1], 1, bias=False)
        self.linear_head.weight = nn.Parameter(weight[None])

    def forward(self, states: Tensor) -> Tensor:
        """Score hidden states, ``[rows, width]``; return ``[rows]``."""
        return cast(Tensor, self.linear_head(states)).squeeze(-1)


class RankingModel(nn.Module):
    """Holds a decoder and its heads, with adapters merged and all weights trainable.

    Modules are named as in the original checkpoints (``model.layers.3.mlp.up_proj``, and
    ``lm_head.3.linear_head`` or ``score``), so that both programs can open each other's adapters.

    Args:
        checkpoint: the checkpoint to start from; its adapters are merged in.
        heads: weights of the heads, ``[heads, width]``.
        dtype: the dtype of all weights.

    Raises:
        ValueError: the model does not support layer-wise execution.
    """

    def __init__(self, checkpoint: Checkpoint, heads: Tensor, dtype: torch.dtype = torch.float32) -> None:
        if not checkpoint.supports_layerwise:
            raise ValueError(
                f"{checkpoint.argument}: model_type {checkpoint.config.model_type!r} cannot be trained here; "
                f"allowed: {', '.join(FAMILIES)}."
            )
        super().__init__()
        # PEFT writes this name into adapters.
        self.__dict__["name_or_path"], _ = without_revision(checkpoint.base)
        decoder = build_decoder(checkpoint)
        fill(decoder, checkpoint, "", torch.device("cpu"), dtype)
        self.config = checkpoint.config
        self.model = decoder
        self.head_layers = list(checkpoint.head_layers)
        weights = heads.to(dtype)
        if checkpoint.head_module(0) is None:
            self.score = nn.Linear(weights.shape[-1], 1, bias=False)
            self.score.weight = nn.Parameter(weights.clone())
        else:
            self.lm_head = nn.ModuleList(Head(weight.clone()) for weight in weights)
        self.requires_grad_(True)

    def forward(
        self,
        packed: PackedPairs,
        compress_layers: Collection[int] = (),
        compress_ratio: int = 1,
    ) -> Tensor:
        """Score a batch at every layer with a head.

        Args:
            packed: the pairs.
            compress_layers: layers after which passages are pooled.
            compress_ratio: tokens pooled into one.

        Returns:
            fp32 scores of each pair's last token, ``[layers, pairs]``, shallowest layer first.
        """
        states = decode(
            cast(Decoder, self.model),
            packed,
            self.head_layers,
            compress_layers=compress_layers,
            compress_ratio=compress_ratio,
            whole_layers=self.runs_whole_layers(),
        )
        if hasattr(self, "score"):
            return cast(Tensor, self.score(states[0])).squeeze(-1)[None].float()
        return torch.stack([head(state) for head, state in zip(self.lm_head, states, strict=True)]).float()

    def runs_whole_layers(self) -> bool:
        """Return whether the deepest layer has to run as a module for all tokens, although few of its states are read.

        Parallel wrappers may gather a layer's weights only in its own forward, which also applies attention dropout.
        """
        return torch.distributed.is_initialized() or bool(getattr(self.config, "attention_dropout", 0.0))

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Keep only the inputs of layers, and recompute the rest in the backward pass; called by the Trainer."""
        # A layer returns pooling weights beside its output; only the non-reentrant kind computes their gradients.
        kind = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        self._checkpointing("enable")(kind, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self._checkpointing("disable")()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Call :meth:`activation_checkpointing_enable`; older versions of transformers use this name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Call :meth:`activation_checkpointing_disable`; older versions of transformers use this name."""
        self.activation_checkpointing_disable()

    def _checkpointing(self, action: str) -> Callable[..., None]:
        newer, older = f"activation_checkpointing_{action}", f"gradient_checkpointing_{action}"
        return cast("Callable[..., None]", getattr(self.model, newer if hasattr(self.model, newer) else older))
