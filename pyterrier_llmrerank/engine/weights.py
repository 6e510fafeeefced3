"""Weights in memory: one copy of a model, shared by every reranker over it, as deep as they need."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.checkpoint import Checkpoint
from .attention import ATTENTION
from .decoder import Decoder
from .fallback import FallbackDecoder
from .quantization import quantization_of


class Sharer(Protocol):
    """A reranker, as its weights see it."""

    def deepest(self) -> int | None:
        """The deepest layer it runs; None for the model's last."""


class Weights:
    """A decoder with its heads and tokenizer, opened on first use and then only as deep as asked.

    Args:
        open_checkpoint: opens the files; called once, on first use.
        device: where the weights go.
        dtype: what they are converted to.
        quantization: what linear layers are quantised to: ``"int8"``, ``"float8"``, or None for not.
        torch_compile: compile each layer, when it is first run.
        below: what the checkpoint's overlay is laid over: its weights are used, not copied.

    Raises:
        ImportError: torchao is asked for, and not installed.
    """

    def __init__(
        self,
        open_checkpoint: Callable[[], Checkpoint],
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,
        torch_compile: bool = False,
        below: Weights | None = None,
    ) -> None:
        self._open_checkpoint = open_checkpoint
        self._below = below
        self.device = device
        self.dtype = dtype
        self._quantize = None if quantization is None else quantization_of(quantization, device, dtype)
        self._compile = torch_compile
        # One for all that are laid over each other: whoever holds it may collect a reranker that shared any of them.
        self._lock: threading.RLock = threading.RLock() if below is None else below._lock
        self._sharers: dict[int, weakref.finalize[..., Sharer]] = {}
        self._checkpoint: Checkpoint | None = None
        self._model: Decoder | FallbackDecoder | None = None
        self._loaded = 0

    def join(self, sharer: Sharer) -> None:
        """Count a reranker among those that these weights are kept for, until it leaves or dies."""
        with self._lock:
            if id(sharer) not in self._sharers:
                self._sharers[id(sharer)] = weakref.finalize(sharer, self._forget, id(sharer))
                self._sharers[id(sharer)].atexit = False

    def leave(self, sharer: Sharer) -> None:
        """Count a reranker no more."""
        with self._lock:
            self._sharers[id(sharer)].detach()
            self._forget(id(sharer))

    @property
    def stack(self) -> tuple[Weights, ...]:
        """These, and what they are laid over: a reranker joins all of it."""
        return (self, *(() if self._below is None else self._below.stack))

    def _forget(self, identity: int) -> None:
        """Drop the layers that only this sharer needed."""
        with self._lock:
            self._sharers.pop(identity, None)
            if self._model is None or isinstance(self._model, FallbackDecoder):
                return
            living = [alive[0] for finalizer in self._sharers.values() if (alive := finalizer.peek()) is not None]
            depths = [sharer.deepest() for sharer in living]
            wanted = max((self.checkpoint.layers if depth is None else depth for depth in depths), default=0)
            while self._loaded > wanted:
                self._loaded -= 1
                empty(self._model.layers[self._loaded])

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint behind these weights; opened on first use, which may download or dequantise it."""
        with self._lock:
            if self._checkpoint is None:
                self._checkpoint = self._open_checkpoint()
            return self._checkpoint

    @property
    def loaded_layers(self) -> int:
        """Decoder layers in memory now."""
        return self._loaded

    def at_depth(self, depth: int) -> tuple[Decoder | FallbackDecoder, Tensor, PreTrainedTokenizerBase]:
        """The decoder with at least its first ``depth`` layers in memory, its heads, its tokenizer."""
        with self._lock:
            if self._model is None:
                self._open()
            assert self._model is not None
            while self._loaded < depth and not isinstance(self._model, FallbackDecoder):
                self._fill_layer(self._loaded)
                self._loaded += 1
            return self._model, self.heads, self.tokenizer

    def _open(self) -> None:
        checkpoint = self.checkpoint
        if checkpoint.supports_layerwise:
            decoder = build_decoder(checkpoint)
            self._model = cast(Decoder, decoder)
            self._fill("embed_tokens")
            self._fill("norm")
            self._model.rotary_emb.to(self.device)
        else:
            self._model = FallbackDecoder(checkpoint, self.device, self.dtype, self._quantize)
            self._loaded = checkpoint.layers
        self.tokenizer = checkpoint.tokenizer()
        self.heads = checkpoint.heads(self.tokenizer).to(self.device)

    def _fill_layer(self, index: int) -> None:
        layer = self._fill(f"layers.{index}", depth=index + 1)
        if self._quantize is not None and self._below is None:
            self._quantize(layer)
        if self._compile:
            layer.compile(dynamic=True)

    def _fill(self, part: str, depth: int = 0) -> nn.Module:
        """Give a part of the decoder its weights: its own, or those of what it is laid over, where at least as deep."""
        module = cast(nn.Module, self._model).get_submodule(part)
        if self._below is None:
            fill(module, self.checkpoint, f"{part}.", self.device, self.dtype)
        else:
            below, _, _ = self._below.at_depth(depth)
            lay_over(module, cast(nn.Module, below).get_submodule(part), self.checkpoint, f"{part}.", self.dtype)
        return module


def build_decoder(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's headless model without its weights: they are still to be filled in.

    Raises:
        ValueError: its configuration, its files and its adapters do not fit each other.
    """
    checkpoint.check_depth()
    with checkpoint.described(), torch.device("meta"):
        decoder: PreTrainedModel = AutoModel.from_config(checkpoint.config, attn_implementation=ATTENTION)  # type: ignore[no-untyped-call]
    weights = {name: tuple(weight.shape) for name, weight in decoder.named_parameters()}
    checkpoint.check_weights(weights)
    checkpoint.check_unused(set(checkpoint) - set(weights))
    with checkpoint.described():
        decoder.rotary_emb = type(decoder.rotary_emb)(checkpoint.config)  # computed, not stored
    checkpoint.check_adapters(
        {name: tuple(m.weight.shape) for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}, weights
    )
    decoder.eval()  # type: ignore[no-untyped-call]
    return decoder


def fill(module: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module its weights: each is read, merged, converted and placed once.

    Args:
        module: a part of the decoder, on the meta device.
        checkpoint: where its weights are.
        prefix: what stands before the module's own names there.
        device: where the weights go.
        dtype: what they are converted to.

    Raises:
        ValueError: one is not of numbers that a weight may be.
    """
    for name, _ in list(module.named_parameters()):
        tensor = checkpoint.tensor(prefix + name)
        owner = module.get_submodule(name.rpartition(".")[0])
        placed = tensor.to(device=device, dtype=dtype, copy=True)
        owner.register_parameter(name.rpartition(".")[2], nn.Parameter(placed, requires_grad=False))


def empty(module: nn.Module) -> None:
    """Take a module's weights, and leave their shapes; quantised ones cannot be moved to the meta device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            part.register_parameter(name, nn.Parameter(shape, requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device="meta"))


class Overlaid(nn.Module):
    """A linear layer that uses another's weight, and adds low-rank updates to what it gives.

    Args:
        weight: the other's.
        bias: likewise; None without.
        factors: of each update, ``[rank, inputs]`` and ``[outputs, rank]``.
        dtype: what the updates are computed in.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        factors: Sequence[tuple[Tensor, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.register_buffer("down", torch.cat([down for down, _ in factors]).to(weight.device, dtype))
        self.register_buffer("up", torch.cat([up for _, up in factors], dim=1).to(weight.device, dtype))

    def forward(self, states: Tensor) -> Tensor:
        """As the layer with the updates merged in."""
        return linear(states, self.weight, self.bias) + linear(linear(states, self.down), self.up)  # type: ignore[arg-type]


def lay_over(module: nn.Module, below: nn.Module, checkpoint: Checkpoint, prefix: str, dtype: torch.dtype) -> None:
    """Give a module another's weights, and the checkpoint's overlay beside them.

    Args:
        module: a part of a decoder.
        below: the same part of the decoder whose weights are used.
        checkpoint: whose overlay it is.
        prefix: what stands before the part's own names there.
        dtype: what the overlay is computed in.
    """
    for name, parameter in below.named_parameters():
        path, _, last = name.rpartition(".")
        module.get_submodule(path).register_parameter(last, parameter)
    for name, part in list(module.named_modules()):
        factors = [a.factors(prefix + name) for a in checkpoint.overlay if prefix + name in a.modules]
        if factors:
            own = dict(part.named_parameters())
            module.set_submodule(name, Overlaid(own["weight"], own.get("bias"), factors, dtype))


_shared: weakref.WeakValueDictionary[Hashable, Weights] = weakref.WeakValueDictionary()
_shared_lock = threading.Lock()


def shared_weights(key: Hashable, create: Callable[[], Weights]) -> Weights:
    """The living weights under this key, else new ones."""
    with _shared_lock:
        weights = _shared.get(key)
        if weights is None:
            weights = _shared[key] = create()
        return weights
