"""The plain path: decoders whose layers cannot be walked one by one are run by their own ``forward``.

It gives the same scores as :func:`~pyterrier_llmrerank.engine.decoder.decode`, without what that saves: rows are
padded, a query is computed again for each of its passages, and all layers are run for all tokens. States between two
layers cannot be pooled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from ..checkpoints.adapters import canonical
from ..checkpoints.checkpoint import Checkpoint, errors_only
from .packing import PackedPairs, on_device

#: What transformers' decoders call the norm after their last layer.
NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")

#: What they call their table of positions, where they have one.
POSITIONS = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "pos_encoding")


class FallbackDecoder(nn.Module):
    """A transformers model of any causal architecture, adapters merged in.

    Args:
        checkpoint: where its weights are.
        device: where they go.
        dtype: what they are converted to.
        quantize: quantises a module's linear layers; None to leave them.

    Raises:
        ValueError: an adapter does not fit it, its files do not fill it or hold more than it has, a token sees those
            after it, or there is nothing in it to quantise.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        quantize: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__()
        with checkpoint.described(), torch.device("meta"):
            wanted = sum(weight.numel() for weight in AutoModel.from_config(checkpoint.config).parameters())  # type: ignore[no-untyped-call]
        held = sum(math.prod(checkpoint.files.shape(name)) for name in checkpoint.files)
        if wanted > held:  # memory would be taken for what is missing
            raise ValueError(
                f"{checkpoint.argument}: config.json describes a model of {wanted} weights, its files hold {held}."
            )
        with checkpoint.described(), errors_only():  # it would warn of the language model's head, which is not needed
            model, loading = AutoModel.from_pretrained(
                checkpoint.folder,
                config=checkpoint.config,
                dtype="auto",
                output_loading_info=True,
                use_safetensors=checkpoint.files.safetensors,
            )
        if loading["missing_keys"]:
            raise ValueError(f"{checkpoint.argument}: the checkpoint has no tensor {min(loading['missing_keys'])!r}.")
        linear = {
            canonical(f"{model.base_model_prefix}.{name}"): module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        weights = {canonical(f"{model.base_model_prefix}.{name}"): weight for name, weight in model.named_parameters()}
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        whole = {name: adapter for adapter in checkpoint.adapters for name in adapter.whole if name in weights}
        for name, adapter in whole.items():
            if weights[name] is model.get_input_embeddings().weight:  # of perhaps more tokens than the base knows
                shapes[name] = (*adapter.whole_shape(name)[:1], *shapes[name][1:])
        checkpoint.check_adapters({name: tuple(module.weight.shape) for name, module in linear.items()}, shapes)
        for name, module in linear.items():
            module.weight.data = checkpoint.merged(name, module.weight.data)
        for name, adapter in whole.items():
            weights[name].data = adapter.read_whole(name)
        self.model: PreTrainedModel = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.argument = checkpoint.argument
        self.layers = checkpoint.layers
        #: How many tokens the model knows.
        self.vocabulary = len(cast(nn.Embedding, self.model.get_input_embeddings()).weight)
        #: The longest sequence that it has positions for; None for any length.
        self.positions = _positions(self.model)
        if not self._is_causal():
            raise ValueError(
                f"{self.argument}: model_type {checkpoint.config.model_type!r} lets a token see those after it; "
                "wanted a causal decoder."
            )
        checkpoint.check_unused(loading["unexpected_keys"])
        if quantize is not None and not linear:
            raise ValueError(
                f"{self.argument}: model_type {checkpoint.config.model_type!r} has no linear layers to quantise; "
                "allowed: quantization=None."
            )
        if quantize is not None:
            quantize(self.model)

    @torch.no_grad()
    def _is_causal(self) -> bool:
        states = self._states(torch.tensor([[1, 2], [1, 3]], device=self.model.device))
        self._one_a_layer = len(states) == self.layers + 1 and all(s.shape == states[-1].shape for s in states)
        first, other = states[-1][:, 0].float()
        return torch.allclose(first, other, rtol=1e-2, atol=1e-2)

    def _states(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Embeddings and each layer's output, the last one after the final norm: ``[pairs, longest, width]`` each."""
        out = self.model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        # What Gemma 3n's last layer leaves is not yet through the norm.
        return (*out.hidden_states[:-1], out.last_hidden_state)

    def forward(self, packed: PackedPairs, cutoffs: Sequence[int]) -> Tensor:
        """The last real token's state at each cutoff.

        Args:
            packed: the pairs.
            cutoffs: how many layers to run before reading, ascending.

        Returns:
            States after the final norm, ``[cutoffs, pairs, width]``.
        """
        device = self.model.device
        places = on_device(packed.places, device)
        length = on_device(packed.real, device)
        mask = torch.arange(places.shape[1], device=device) < length[:, None]
        ids = packed.ids_below(self.vocabulary)
        states = self._states(on_device(ids, device)[places], mask.long())
        pair = torch.arange(len(packed), device=device)
        read = []
        for cutoff in cutoffs:
            if cutoff == self.layers:
                read.append(states[-1][pair, length - 1])
            else:
                read.append(self._norm(cutoff)(states[cutoff][pair, length - 1]))
        return torch.stack(read)

    def check_cutoffs(self, cutoffs: Sequence[int]) -> None:
        """Raise ValueError on a cutoff above the last layer that cannot be read.

        The name of the model's final norm may not be known, or its layers may leave more than one state a token.
        """
        for cutoff in cutoffs:
            if cutoff != self.layers:
                self._norm(cutoff)

    def _norm(self, cutoff: int) -> nn.Module:
        """The norm that a state before the last layer goes through."""
        for name in NORMS:
            if self._one_a_layer and isinstance(norm := getattr(self.model, name, None), nn.Module):
                return norm
        raise ValueError(
            f"cutoff={cutoff}: {self.argument} is not a model of which the final norm is known; "
            f"allowed: {self.layers}, its last layer."
        )


def _positions(model: PreTrainedModel) -> int | None:
    """The longest sequence for which a model has positions; None where it computes them, so that any will do."""
    lengths = []
    for name, table in [*model.named_parameters(), *model.named_buffers()]:
        owner = name.removesuffix(".weight")
        if owner.rpartition(".")[2] in POSITIONS:
            skipped = getattr(model.get_submodule(owner), "offset", 0) if owner != name else 0  # rows before the first
            lengths.append(len(table) - skipped)
    return min(lengths, default=None)
