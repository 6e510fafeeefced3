"""Hold model weights in memory: one copy per device, shared by all rerankers over it, no deeper than they need."""

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
from .linears import can_pack, pack_linears, product, replace_linears
from .norms import replace_norms
from .quantization import quantization_of


class Consumer(Protocol):
    """Describes a reranker to the weights that it shares with others."""

    def deepest(self) -> int | None:
        """Return the deepest layer that the reranker runs; None for the model's last."""


class Weights:
    """Holds a decoder with its heads and tokenizer. Opens files on first use, and loads layers on demand.

    Args:
        open_checkpoint: opens the files; called once, on first use.
        device: the device of the weights.
        dtype: the dtype of the weights.
        quantization: quantises linear layers to ``"int8"`` or ``"float8"``; None leaves them as they are.
        torch_compile: compile each layer when it first runs.
        below: weights to share in place of loading them. The checkpoint's overlay adapters run on top, unmerged.

    Raises:
        ImportError: ``quantization`` is given, but torchao is not installed.
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
        self._quantize = None
        if quantization is not None:
            self._quantize = quantization_of(quantization, device, dtype, torch_compile)
        self._compile = torch_compile
        self._packs = can_pack(device, dtype) and quantization is None and not torch_compile
        # Garbage collection may drop a reranker, and call _forget, while any lock of a stack is held. With one lock for
        # the whole stack, that cannot deadlock.
        self._lock: threading.RLock = threading.RLock() if below is None else below._lock
        self._consumers: dict[int, weakref.finalize[..., Consumer]] = {}
        self._checkpoint: Checkpoint | None = None
        self._model: Decoder | FallbackDecoder | None = None
        self._loaded = 0

    def join(self, consumer: Consumer) -> None:
        """Keep the layers that a reranker needs until it leaves or is garbage-collected."""
        with self._lock:
            if id(consumer) not in self._consumers:
                self._consumers[id(consumer)] = weakref.finalize(consumer, self._forget, id(consumer))
                self._consumers[id(consumer)].atexit = False

    def leave(self, consumer: Consumer) -> None:
        """Drop the layers that only this reranker needs."""
        with self._lock:
            self._consumers[id(consumer)].detach()
            self._forget(id(consumer))

    @property
    def stack(self) -> tuple[Weights, ...]:
        """These weights and all below them; a reranker joins each."""
        return (self, *(() if self._below is None else self._below.stack))

    def _forget(self, identity: int) -> None:
        """Remove a reranker, by its ``id``, and unload the layers that no other needs."""
        with self._lock:
            self._consumers.pop(identity, None)
            if self._model is None or isinstance(self._model, FallbackDecoder):
                return
            living = [alive[0] for finalizer in self._consumers.values() if (alive := finalizer.peek()) is not None]
            depths = [consumer.deepest() for consumer in living]
            needed = max((self.checkpoint.layers if depth is None else depth for depth in depths), default=0)
            while self._loaded > needed:
                self._loaded -= 1
                unload(self._model.layers[self._loaded])

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of these weights; the first use opens it, which may download or dequantise files."""
        with self._lock:
            if self._checkpoint is None:
                self._checkpoint = self._open_checkpoint()
            return self._checkpoint

    def at_depth(self, depth: int) -> tuple[Decoder | FallbackDecoder, Tensor, PreTrainedTokenizerBase]:
        """Return the decoder with at least its first ``depth`` layers in memory, its heads and its tokenizer."""
        with self._lock:
            if self._model is None:
                self._open()
            assert self._model is not None
            while self._loaded < depth and not isinstance(self._model, FallbackDecoder):
                self._load_layer(self._loaded)
                self._loaded += 1
            return self._model, self.heads, self.tokenizer

    def _open(self) -> None:
        checkpoint = self.checkpoint
        if checkpoint.supports_layerwise:
            decoder = build_decoder(checkpoint)
            if self._packs:
                replace_linears(decoder)
            self._model = cast(Decoder, decoder)
            self._load("embed_tokens")
            self._load("norm")
            self._model.rotary_emb.to(self.device)
        else:
            self._model = FallbackDecoder(checkpoint, self.device, self.dtype, self._quantize)
            self._loaded = checkpoint.layers
        self.tokenizer = checkpoint.tokenizer()
        self.heads = checkpoint.heads(self.tokenizer).to(self.device)

    def _load_layer(self, index: int) -> None:
        layer = self._load(f"layers.{index}", depth=index + 1)
        if self._quantize is not None and self._below is None:
            self._quantize(layer)
        pack_linears(layer)
        if self._compile:
            layer.compile(dynamic=True)
            if self._quantize is not None and self.device.type == "cuda":
                for part in layer.modules():  # the deepest layer calls its parts
                    if isinstance(part, nn.Linear):
                        part.compile(dynamic=True)

    def _load(self, part: str, depth: int = 0) -> nn.Module:
        """Load a part of the decoder, or share it with the weights below, which first load ``depth`` layers."""
        module = cast(nn.Module, self._model).get_submodule(part)
        if self._below is None:
            fill(module, self.checkpoint, f"{part}.", self.device, self.dtype)
        else:
            below, _, _ = self._below.at_depth(depth)
            share(module, cast(nn.Module, below).get_submodule(part), self.checkpoint, f"{part}.", self.dtype)
        return module


def build_decoder(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the checkpoint's headless model on the meta device, without weights, and check that its files fit.

    Raises:
        ValueError: its configuration, files and adapters do not fit each other.
    """
    checkpoint.check_depth()
    with checkpoint.blame_config(), torch.device("meta"):
        decoder: PreTrainedModel = AutoModel.from_config(checkpoint.config, attn_implementation=ATTENTION)  # type: ignore[no-untyped-call]
    weights = {name: tuple(weight.shape) for name, weight in decoder.named_parameters()}
    checkpoint.check_weights(weights)
    checkpoint.check_unused(set(checkpoint) - set(weights))
    with checkpoint.blame_config():
        decoder.rotary_emb = type(decoder.rotary_emb)(checkpoint.config)  # computed, not stored
    replace_norms(decoder)
    checkpoint.check_adapters(
        {name: tuple(m.weight.shape) for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}, weights
    )
    decoder.eval()  # type: ignore[no-untyped-call]
    return decoder


def fill(module: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
    """Load a module's weights: read, merge, convert and place one at a time, to keep the peak of memory low.

    Args:
        module: a part of the decoder, on the meta device.
        checkpoint: the source of its weights.
        prefix: precedes the module's own names in the checkpoint.
        device: the device of the weights.
        dtype: the dtype of the weights.

    Raises:
        ValueError: a tensor is missing or of an unsupported dtype.
    """
    for name, _ in list(module.named_parameters()):
        placed = checkpoint.place(prefix + name, device, dtype)
        owner = module.get_submodule(name.rpartition(".")[0])
        owner.register_parameter(name.rpartition(".")[2], nn.Parameter(placed, requires_grad=False))
    checkpoint.files.release()


def unload(module: nn.Module) -> None:
    """Replace a module's weights by their shapes on the meta device; ``to("meta")`` fails for quantised ones."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            part.register_parameter(name, nn.Parameter(shape, requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device="meta"))


def share(module: nn.Module, below: nn.Module, checkpoint: Checkpoint, prefix: str, dtype: torch.dtype) -> None:
    """Give a module the weights of another, and run the checkpoint's overlay adapters beside them.

    Args:
        module: a part of a decoder.
        below: the same part of the decoder with the weights.
        checkpoint: the source of the overlay.
        prefix: precedes the part's own names in the checkpoint.
        dtype: the dtype of the overlay.
    """
    for name, parameter in below.named_parameters():
        path, _, last = name.rpartition(".")
        module.get_submodule(path).register_parameter(last, parameter)
    for name, part in list(module.named_modules()):
        factors = [a.factors(prefix + name) for a in checkpoint.overlay if prefix + name in a.modules]
        if factors:
            own = dict(part.named_parameters())
            module.set_submodule(name, LoRALinear(own["weight"], own.get("bias"), factors, dtype))


class LoRALinear(nn.Module):
    """Applies a linear layer and unmerged low-rank updates.

    Args:
        weight: the weight of the linear layer; shared, not copied.
        bias: the bias of the linear layer; None without one.
        factors: each update's factors, ``[rank, inputs]`` and ``[outputs, rank]``.
        dtype: the dtype of the updates.
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
        """Compute the same as the linear layer with all updates merged in."""
        update = linear(linear(states, self.down), self.up)  # type: ignore[arg-type]
        return product(states, self.weight, self.bias) + update


_shared: weakref.WeakValueDictionary[Hashable, Weights] = weakref.WeakValueDictionary()
_shared_lock = threading.Lock()


def shared_weights(key: Hashable, create: Callable[[], Weights]) -> Weights:
    """Return the weights under a key if they are in use; else create them."""
    with _shared_lock:
        weights = _shared.get(key)
        if weights is None:
            weights = _shared[key] = create()
        return weights
