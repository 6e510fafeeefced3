"""LoRA adapters as PEFT saves them, read to be merged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .files import TensorFiles, read_json


def canonical(name: str) -> str:
    """A tensor's or module's name without the prefix of the model around the headless decoder."""
    return name.removeprefix("model.")


class Adapter:
    """A PEFT LoRA folder: low-rank updates by module, and tensors that were trained whole.

    Args:
        folder: where it is.
        argument: the caller's argument and its value, for messages.
        name: what its user calls it; None for its folder.

    Raises:
        FileNotFoundError: the folder is no adapter.
        ValueError: the adapter is of another kind than plain LoRA.
    """

    _KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
    _WHOLE = re.compile(r"base_model\.model\.(?P<module>.+?)(\.modules_to_save)?(\.default)?\.weight")

    def __init__(self, folder: Path, argument: str, name: str | None = None) -> None:
        config = folder / "adapter_config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{argument}: {folder} has no adapter_config.json; wanted a PEFT LoRA folder.")
        self.folder = folder
        self.argument = argument
        self.name = str(folder) if name is None else name
        self.config = read_json(config)
        if self.config.get("peft_type") != "LORA" or self.config.get("use_dora"):
            raise ValueError(f"{argument}: peft_type {self.config.get('peft_type')!r} (or DoRA); only LoRA is allowed.")
        self._files = TensorFiles(folder, "adapter_model", argument)
        self._sides: dict[str, dict[str, str]] = {}
        self._full_names: dict[str, str] = {}
        self.whole: dict[str, str] = {}
        for key in self._files:
            if match := self._KEY.fullmatch(key):
                self._sides.setdefault(canonical(match["module"]), {})[match["side"]] = key
                self._full_names[canonical(match["module"])] = match["module"]
            elif (match := self._WHOLE.fullmatch(key)) and ".lora_" not in key:
                self.whole[canonical(match["module"]) + ".weight"] = key
            else:
                raise ValueError(f"{argument}: tensor {key!r} is no part of a plain LoRA adapter.")
        for module, sides in self._sides.items():
            if set(sides) != {"A", "B"}:
                raise ValueError(f"{argument}: module {module!r} has only lora_{'/'.join(sides)}; A and B are wanted.")

    @property
    def base(self) -> str:
        """The model it says it belongs to.

        Raises:
            ValueError: it names none.
        """
        base = self.config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ValueError(
                f"{self.argument}: the adapter names no base model (base_model_name_or_path is {base!r}); write one "
                "there, or give a RankLLaMA base_model."
            )
        return base

    @property
    def modules(self) -> set[str]:
        """The modules it updates."""
        return set(self._sides)

    def ending(self, ending: str) -> set[str]:
        """The modules it updates whose names end so."""
        return {module for module in self._sides if module.endswith(ending)}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless each module it updates is among these, with a weight of the shape given."""
        if unknown := sorted(self.modules - set(shapes)):
            raise ValueError(f"{self.argument}: the model has no module {unknown[0]!r} ({len(unknown)} such modules).")
        for module, sides in self._sides.items():
            down, up = (self._files.shape(sides[side]) for side in "AB")
            if len(down) != 2 or len(up) != 2 or (up[0], down[1]) != shapes[module] or up[1] != down[0]:
                raise ValueError(
                    f"{self.argument}: adapter of another shape: {module} is {list(shapes[module])} in the model, "
                    f"the adapter has lora_A {list(down)} and lora_B {list(up)}."
                )

    def add_to(self, weight: Tensor, module: str) -> None:
        """Add the update of a module to its weight, fp32, in place."""
        down, up = self.factors(module)
        weight.addmm_(up, down)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """The update of a module as fp32 ``[rank, inputs]`` and ``[outputs, rank]``; their product is added."""
        down, up = (self._files.read(self._sides[module][side]).float() for side in "AB")
        rank = down.shape[0]
        alpha = _pattern(
            self.config.get("alpha_pattern"), self._full_names[module], self.config.get("lora_alpha", rank)
        )
        scaling = alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank
        return down, up * scaling

    def read_whole(self, name: str) -> Tensor:
        """A tensor that was trained whole."""
        return self._files.read(self.whole[name])


def _pattern(pattern: dict[str, float] | None, module: str, default: float) -> float:
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default
