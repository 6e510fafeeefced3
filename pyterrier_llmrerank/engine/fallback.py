"""Run decoders that do not support layer-wise execution, by their own ``forward``.

This takes more work than :func:`~pyterrier_llmrerank.engine.decoder.decode`: rows are padded, a query is computed again
for each of its passages, and all layers run for all tokens. Passages cannot be compressed between layers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from ..checkpoints.adapters import canonical
from ..checkpoints.buffers import MASK
from ..checkpoints.checkpoint import Checkpoint, silence_warnings
from .packing import PackedPairs, on_device

#: Names of the norm after the last layer in transformers' decoders.
NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")

#: Names of a table of position embeddings in transformers' decoders.
POSITIONS = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "pos_encoding")


class FallbackDecoder(nn.Module):
    """Runs a transformers model of any causal architecture, with adapters merged in.

    Args:
        checkpoint: the source of the weights.
        device: the device of the weights.
        dtype: the dtype of the weights.
        quantize: quantises a module's linear layers; None leaves them as they are.

    Raises:
        ValueError: an adapter does not fit the model, the files lack a tensor of the model or hold an unknown one, the
            model is not causal, or it has no linear layers to quantise.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        quantize: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__()
        model, unexpected = _open_model(checkpoint)
        linear_layers = _merge_adapters(model, checkpoint)
        self.model: PreTrainedModel = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.argument = checkpoint.argument
        self.layers = checkpoint.layers
        self.vocabulary = len(cast(nn.Embedding, self.model.get_input_embeddings()).weight)
        #: The longest sequence that the model has positions for; None for any length.
        self.positions = _positions(self.model)
        model_type = checkpoint.config.model_type
        if not self._is_causal():
            raise ValueError(
                f"{self.argument}: in model_type {model_type!r} a token sees later ones; expected a causal decoder."
            )
        checkpoint.check_unused(unexpected)
        if quantize is not None and not linear_layers:
            raise ValueError(
                f"{self.argument}: model_type {model_type!r} has no linear layers to quantise; "
                "allowed: quantization=None."
            )
        if quantize is not None:
            quantize(self.model)

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Return whether no token sees a later one. Also finds the layers, for :meth:`forward`."""
        ids = torch.tensor([[1, 2], [1, 3]], device=self.model.device)
        states = self._states(ids)
        self._one_state_per_layer = len(states) == self.layers + 1 and all(s.shape == states[-1].shape for s in states)
        #: Its layers, if the output of each is the state after it.
        self._modules_of_layers = self._find_layers(ids, states)
        first, other = states[-1][:, 0].float()
        return torch.allclose(first, other, rtol=1e-2, atol=1e-2)

    def _states(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return embeddings and each layer's output, ``[pairs, longest, width]`` each; the last is normed."""
        out = self.model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        # Gemma 3n's last hidden state is not normed yet.
        return (*out.hidden_states[:-1], out.last_hidden_state)

    def _find_layers(self, ids: Tensor, states: tuple[Tensor, ...]) -> Sequence[nn.Module]:
        """Return the layers if the output of each is the state after it; else nothing."""
        lists = [part for part in self.model.modules() if isinstance(part, nn.ModuleList) and len(part) == self.layers]
        if len(lists) != 1 or not self._one_state_per_layer:
            return ()
        found = self._states_after(range(1, self.layers), ids, None, lists[0])
        same = len(found) == self.layers and all(map(torch.equal, found.values(), states[1:]))
        return list(lists[0]) if same else ()

    def _states_after(
        self, cutoffs: Iterable[int], ids: Tensor, mask: Tensor | None, layers: Iterable[nn.Module]
    ) -> dict[int, Tensor]:
        """Return the output of the layers at the cutoffs, and the last hidden state; no other state is kept."""
        found: dict[int, Tensor] = {}
        wanted = set(cutoffs) - {self.layers}
        own = threading.get_ident()

        def keep(cutoff: int, output: Tensor | tuple[Tensor, ...]) -> None:
            if threading.get_ident() == own:  # rerankers in other threads may run the same model
                found[cutoff] = output if isinstance(output, Tensor) else output[0]

        hooks = [
            layer.register_forward_hook(lambda _, __, output, cutoff=cutoff: keep(cutoff, output))
            for cutoff, layer in enumerate(layers, 1)
            if cutoff in wanted
        ]
        try:
            out = self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found | {self.layers: out.last_hidden_state}

    def forward(self, packed: PackedPairs, cutoffs: Sequence[int]) -> Tensor:
        """Return the last real token's state at each cutoff.

        Args:
            packed: the pairs, within the model's :class:`~pyterrier_llmrerank.engine.tokenising.Limits`.
            cutoffs: how many layers to run before reading, ascending.

        Returns:
            States after the final norm, ``[cutoffs, pairs, width]``.
        """
        device = self.model.device
        places = on_device(packed.places, device)
        length = on_device(packed.real, device)
        mask = torch.arange(places.shape[1], device=device) < length[:, None]
        rows = on_device(packed.ids, device)[places]
        states: Mapping[int, Tensor]
        if self._modules_of_layers or set(cutoffs) == {self.layers}:
            states = self._states_after(cutoffs, rows, mask.long(), self._modules_of_layers)
        else:
            states = dict(enumerate(self._states(rows, mask.long())))
        pair = torch.arange(len(packed), device=device)
        read = []
        for cutoff in cutoffs:
            if cutoff == self.layers:
                read.append(states[self.layers][pair, length - 1])
            else:
                read.append(self._norm(cutoff)(states[cutoff][pair, length - 1]))
        return torch.stack(read)

    def check_cutoffs(self, cutoffs: Sequence[int]) -> None:
        """Check that each cutoff can be read.

        Raises:
            ValueError: a cutoff is not the last layer, and the final norm has no known name or layers have several
                states per token.
        """
        for cutoff in cutoffs:
            if cutoff != self.layers:
                self._norm(cutoff)

    def _norm(self, cutoff: int) -> nn.Module:
        """Return the final norm, which states of shallower layers go through too."""
        for name in NORMS:
            if self._one_state_per_layer and isinstance(norm := getattr(self.model, name, None), nn.Module):
                return norm
        raise ValueError(
            f"cutoff={cutoff}: the final norm of {self.argument} is not known; allowed: {self.layers}, its last layer."
        )


def _open_model(checkpoint: Checkpoint) -> tuple[Any, Sequence[str]]:
    """Load the headless model by transformers; return it, and the names of the tensors that it does not use.

    Raises:
        ValueError: config.json does not describe a model, or the files do not fill it.
    """
    with checkpoint.blame_config(), torch.device("meta"):
        wanted = sum(weight.numel() for weight in AutoModel.from_config(checkpoint.config).parameters())  # type: ignore[no-untyped-call]
    held = sum(math.prod(checkpoint.files.shape(name)) for name in checkpoint.files)
    if wanted > held:  # checked first, because transformers allocates missing weights
        raise ValueError(
            f"{checkpoint.argument}: config.json describes a model of {wanted} weights, its files hold {held}."
        )
    with checkpoint.blame_config(), silence_warnings():  # it would warn of the unused language model head
        model, loading = AutoModel.from_pretrained(
            checkpoint.folder,
            config=checkpoint.config,
            dtype="auto",
            output_loading_info=True,
            use_safetensors=checkpoint.files.safetensors,
        )
    if loading["missing_keys"]:
        raise ValueError(f"{checkpoint.argument}: the checkpoint has no tensor {min(loading['missing_keys'])!r}.")
    # Some of transformers' models leave out every tensor that is named like a mask of older releases.
    own = [f".{name}" for name in model.state_dict()]
    masks = {name for name in checkpoint if MASK.fullmatch(name) and not any(f".{name}".endswith(o) for o in own)}
    return model, sorted(masks.union(loading["unexpected_keys"]))


def _merge_adapters(model: Any, checkpoint: Checkpoint) -> dict[str, nn.Linear]:
    """Merge the checkpoint's adapters into a model, and return the model's linear layers by name.

    Raises:
        ValueError: an adapter does not fit the model.
    """

    def full_name(name: str) -> str:
        return canonical(f"{model.base_model_prefix}.{name}")

    linear_layers = {full_name(name): m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    weights = {full_name(name): weight for name, weight in model.named_parameters()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    whole = {name: adapter for adapter in checkpoint.adapters for name in adapter.whole if name in weights}
    for name, adapter in whole.items():
        if weights[name] is model.get_input_embeddings().weight:  # an adapter may add tokens
            shapes[name] = (*adapter.whole_shape(name)[:1], *shapes[name][1:])
    checkpoint.check_adapters({name: tuple(layer.weight.shape) for name, layer in linear_layers.items()}, shapes)
    for name, layer in linear_layers.items():
        layer.weight.data = checkpoint.merge_updates(name, layer.weight.data)
    for name, adapter in whole.items():
        weights[name].data = adapter.read_whole(name)
    return linear_layers


def _positions(model: PreTrainedModel) -> int | None:
    """Return the longest sequence that a model has position embeddings for; None if it computes positions."""
    lengths = []
    for name, table in [*model.named_parameters(), *model.named_buffers()]:
        owner = name.removesuffix(".weight")
        if owner.rpartition(".")[2] in POSITIONS:
            unused = getattr(model.get_submodule(owner), "offset", 0) if owner != name else 0  # rows before position 0
            lengths.append(len(table) - unused)
    return min(lengths, default=None)
