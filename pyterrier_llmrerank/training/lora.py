"""LoRA: PEFT's layers in fewer passes over memory, and the model that is trained with them."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from ..checkpoints.adapters import Adapter
from ..checkpoints.checkpoint import SCORE, Checkpoint
from ..checkpoints.locate import without_revision
from .model import RankingModel
from .recipes import Recipe

logger = logging.getLogger(__name__)


class _LowRankUpdate(Function):
    r"""Computes :math:`x W^T + s\,(x A^T) B^T` in the dtype of a frozen :math:`W`.

    PEFT casts the input to the adapter's dtype and back, and scales and adds the update in separate passes over the
    whole output. Here both products add into one result, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        small_down, small_up = down.to(weight.dtype), up.to(weight.dtype)
        low = rows @ small_down.t()
        output = (rows @ weight.t()).addmm_(low, small_up.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, small_down, small_up, low)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, down.dtype)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> Any:
        rows, weight, down, up, low = ctx.saved_tensors  # type: ignore[attr-defined]
        scale, shape, (input_dtype, adapter_dtype) = ctx.scale, ctx.shape, ctx.dtypes  # type: ignore[attr-defined]
        gradient = gradients[0].reshape(-1, weight.shape[0]).to(weight.dtype)
        through_up = gradient @ up
        of_input = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            of_input = (gradient @ weight).addmm_(through_up, down, alpha=scale).view(shape).to(input_dtype)
        of_down = (through_up.t() @ rows).to(adapter_dtype).mul_(scale)
        of_up = (gradient.t() @ low).to(adapter_dtype).mul_(scale)
        return of_input, None, of_down, of_up, None


class LowRankLinear(lora.Linear):
    """Computes PEFT's LoRA layer together with its base layer; in unusual settings, by PEFT's own code."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the update, as PEFT does."""
        base = self.get_base_layer()
        kind = x.device.type
        computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._adapter_dtype()
        usual = (
            list(self.active_adapters) == ["default"]
            and not (self.disable_adapters or self.merged or self.lora_variant or args or kwargs)
            and base.bias is None
            and base.weight.dtype == computed
            and not base.weight.requires_grad
            and not hasattr(base.weight, "ds_id")  # DeepSpeed's stage 3 gathers a weight in its own layer's forward
            and not (self.training and self.lora_dropout["default"].__class__ is torch.nn.Dropout)
        )
        if not usual:
            return super().forward(x, *args, **kwargs)
        down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
        update: Any = _LowRankUpdate.apply(x, base.weight, down, up, self.scaling["default"])  # type: ignore[no-untyped-call]
        return cast(Tensor, update)

    def _adapter_dtype(self) -> torch.dtype:
        return cast(torch.dtype, next(iter(self.lora_A.values())).weight.dtype)


#: Settings kept from the configuration of an adapter that is trained further. Others could change the base's weights
#: or the computation in ways that inference does not follow.
KEPT_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern",
)  # fmt: skip


def with_lora(checkpoint: Checkpoint, heads: Tensor, recipe: Recipe, dtype: torch.dtype) -> PeftModel:
    """Build a model in which LoRA adapters and heads alone are trainable.

    Layer-wise heads are trained through LoRA, as in the original; a single ``score`` head is trained in full. If the
    checkpoint was opened from an adapter, that adapter is trained further, with its own rank and modules.

    Args:
        checkpoint: the checkpoint to start from; its adapters are merged in, except one to train further.
        heads: initial weights of the heads, ``[heads, width]``.
        recipe: rank, scale, dropout and modules of the updates.
        dtype: the dtype of the frozen weights; trainable weights are fp32.

    Raises:
        ValueError: the model lacks a module that the recipe targets, or the adapter holds tensors that cannot be
            trained.
    """
    continued = checkpoint.adapter
    config = _config(recipe) if continued is None else _continued_config(continued)
    _, config.revision = without_revision(checkpoint.base)
    config.modules_to_save = ["score"] if checkpoint.head_module(0) is None else None
    # There is no task type: with one, PEFT would wrap the model for inputs that it does not have.
    config._register_custom_module({nn.Linear: LowRankLinear})
    checkpoint.adapters = [adapter for adapter in checkpoint.adapters if adapter is not continued]
    ranking = RankingModel(checkpoint, heads, dtype)
    modules = {module.rpartition(".")[2] for module, _ in ranking.named_modules()}
    if unknown := [target for target in recipe.target_modules if target not in modules]:
        raise ValueError(
            f"target_modules: the model has no {unknown[0]!r}; allowed: the last parts of its modules' names."
        )
    model = cast(PeftModel, get_peft_model(cast(Any, ranking), config))
    # Embeddings are not trained; without this, PEFT asks the hub whether they were resized.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]
    if continued is not None:
        set_peft_model_state_dict(model, load_peft_weights(str(continued.folder), device="cpu"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _config(recipe: Recipe) -> LoraConfig:
    """Return PEFT's configuration of a new adapter."""
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=cast(int, recipe.lora_alpha),
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.target_modules),
    )


def _continued_config(adapter: Adapter) -> LoraConfig:
    """Return PEFT's configuration of an adapter that is trained further.

    Raises:
        ValueError: it holds tensors that cannot be trained.
    """
    if others := sorted(adapter.whole.keys() - {SCORE}):
        raise ValueError(
            f"{adapter.argument}: holds the whole tensor {others[0]!r}, which cannot be trained further; "
            "allowed: LoRA and a score head. save(folder, merged=True) writes a model to train."
        )
    logger.info("training %s further, with its rank, scale and modules, not the recipe's", adapter.folder)
    kept = {key: adapter.config.get(key) for key in KEPT_FIELDS}
    return LoraConfig(**{key: value for key, value in kept.items() if value is not None})
