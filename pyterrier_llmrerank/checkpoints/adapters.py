"""LoRA adapters as PEFT saves them: the factors of their updates and the weights that they replace, all checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import short
from .description import FILE
from .json_files import read_json
from .locate import at_revision, folder_of
from .tensors import TensorFiles


def canonical(name: str) -> str:
    """Return the name of a tensor or module in the headless decoder, without the prefix of the model around it."""
    return name.removeprefix("model.")


#: Fields of PEFT's LoraConfig that choose the modules with an update. The tensors must agree with them.
TARGETS = {"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"}

#: Fields of PEFT's LoraConfig that this module reads.
FIELDS_READ = TARGETS | {
    "alpha_pattern", "base_model_name_or_path", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern",
    "revision", "use_rslora",
}  # fmt: skip

#: Fields of PEFT's LoraConfig that matter for training alone.
WITHOUT_EFFECT = {
    "auto_mapping", "bias", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
    "peft_version", "qalora_group_size", "runtime_config", "task_type",
}  # fmt: skip

#: Fields that turn LoRA into a variant of it, unless they are null, false or empty.
VARIANTS = {
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "megatron_config",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    "velora_config",
}  # fmt: skip

#: The initialisations of LoRA that leave the base's weights unchanged.
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva", "mica")

#: PEFT's defaults for lora_alpha and r.
LORA_ALPHA = LORA_RANK = 8

#: Operators that let a regular expression match in more than one way.
WILDCARDS = re.compile(r"[*+?|{]")

#: Larger than any lora_alpha in use.
MAX_ALPHA = 1e9


class Adapter:
    """Reads a PEFT LoRA folder: low-rank updates by module, and tensors that were trained whole.

    Args:
        folder: the folder.
        argument: the caller's argument and its value, for messages.
        name: the user's name for the adapter; None for its folder.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the adapter is not plain LoRA.
    """

    _ORIGINAL = re.compile(r"base_model\.model\.(?P<module>.+)\.original_module\.weight")
    _KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
    _WHOLE = re.compile(r"base_model\.model\.(?P<module>.+?)(\.modules_to_save)?(\.default)?\.weight")

    def __init__(self, folder: Path, argument: str, name: str | None = None) -> None:
        config = folder / "adapter_config.json"
        if not config.is_file():
            saved = (folder / FILE).is_file()
            hint = "it is a saved reranker: open it as model" if saved else "expected a PEFT LoRA folder"
            raise FileNotFoundError(f"{argument}: {folder} has no adapter_config.json; {hint}.")
        self.folder = folder
        self.argument = argument
        self.name = str(folder) if name is None else name
        self.config = read_json(config)
        self._check_config()
        self._files = TensorFiles(folder, "adapter_model", argument)
        self._sides: dict[str, dict[str, str]] = {}
        self._full_names: dict[str, str] = {}
        #: Tensors that replace the model's own: their names in the file, by their names in the headless decoder.
        self.whole: dict[str, str] = {}
        originals: dict[str, str] = {}
        for key in self._files:
            if match := self._ORIGINAL.fullmatch(key):  # its value before training
                same = originals.setdefault(canonical(match["module"]) + ".weight", key)
            elif match := self._KEY.fullmatch(key):
                same = self._sides.setdefault(canonical(match["module"]), {}).setdefault(match["side"], key)
                self._full_names[canonical(match["module"])] = match["module"]
            elif (match := self._WHOLE.fullmatch(key)) and ".lora_" not in key:
                same = self.whole.setdefault(canonical(match["module"]) + ".weight", key)
            else:
                raise ValueError(f"{argument}: tensor {short(key)} is not part of a plain LoRA adapter.")
            if same != key:
                raise ValueError(
                    f"{argument}: the adapter has both {short(same, 200)} and {short(key, 200)}; expected one."
                )
        if untrained := sorted(set(originals) - set(self.whole)):
            raise ValueError(
                f"{argument}: tensor {short(originals[untrained[0]])} is the original of a trained tensor, "
                f"{short(untrained[0])}, which is missing."
            )
        for module, sides in self._sides.items():
            if set(sides) != {"A", "B"}:
                raise ValueError(
                    f"{argument}: module {short(module)} has only lora_{'/'.join(sides)}; expected A and B."
                )
            if f"{module}.weight" in self.whole:
                raise ValueError(f"{argument}: module {short(module)} has an update and a whole weight; expected one.")
        self._check_targets()
        for module, sides in self._sides.items():
            rank = self._by_pattern("rank", self._full_names[module], "r", LORA_RANK)
            if (shape := self._files.shape(sides["A"]))[0] != rank:
                raise ValueError(
                    f"{argument}: lora_A of {short(module)} is {list(shape)}, but its rank in adapter_config.json is "
                    f"{short(rank)}."
                )

    def _check_config(self) -> None:
        """Raise ValueError unless the configuration describes plain LoRA."""
        if self.config.get("peft_type") != "LORA":
            kind = short(self.config.get("peft_type"))
            raise ValueError(f"{self.argument}: peft_type is {kind}; only LoRA is allowed.")
        for key, value in self.config.items():
            if value and key not in FIELDS_READ | WITHOUT_EFFECT:
                known = "a variant of LoRA" if key in VARIANTS else "an unknown field"
                raise ValueError(
                    f"{self.argument}: {short(key)} in adapter_config.json is {short(value)}, which is {known}; only "
                    "plain LoRA is allowed. Where PEFT can merge the adapter, open the merged model instead."
                )
        initialisation = self.config.get("init_lora_weights", True)
        if initialisation and initialisation not in INITIALISATIONS:
            raise ValueError(
                f"{self.argument}: init_lora_weights is {short(initialisation)}, which may change the base's weights; "
                f"allowed: {', '.join(map(repr, INITIALISATIONS))}. PEFT's save_pretrained converts the others with "
                "path_initial_model_for_weight_conversion, or merge the adapter with PEFT and open the merged model."
            )

    def _check_targets(self) -> None:
        """Raise ValueError if the tensors update a module that the configuration does not target."""
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        given = {name: self.config[name] for name in TARGETS if self.config.get(name) is not None}
        patterns = [value for value in given.values() if isinstance(value, str)]
        if "target_modules" not in given or any(len(WILDCARDS.findall(pattern)) > 2 for pattern in patterns):
            return  # PEFT's defaults for the model, or a match that could take forever
        try:
            config = LoraConfig(**given)
            unnamed = [name for name in self._full_names.values() if not check_target_module_exists(config, name)]
        except Exception as error:
            raise ValueError(f"{self.argument}: {', '.join(sorted(given))} in adapter_config.json: {error}") from error
        if unnamed and config.target_modules != "all-linear":
            raise ValueError(
                f"{self.argument}: module {short(unnamed[0])} has an update, but is not among the modules that "
                f"{', '.join(sorted(given))} in adapter_config.json name ({len(unnamed)} such modules)."
            )

    @property
    def base(self) -> str:
        """The base that the adapter names, at the revision that it names.

        Raises:
            ValueError: the adapter names no base.
        """
        base = self.config.get("base_model_name_or_path")
        if not isinstance(base, str) or not 0 < len(base) < 4096:
            raise ValueError(
                f"{self.argument}: the adapter names no base model (base_model_name_or_path is {short(base)}); write "
                "one there, or give a RankLLaMA base_model."
            )
        return at_revision(base, self.config.get("revision"))

    def base_folder(self) -> Path:
        """Return the folder of the base.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: as
                :func:`~pyterrier_llmrerank.checkpoints.locate.folder_of`.
            ValueError: the adapter names no base.
        """
        try:
            return folder_of(self.base, f"the base model that {self.argument} names")
        except (FileNotFoundError, PermissionError, ConnectionError) as error:
            raise type(error)(
                f"{error} If you have that base elsewhere, give a RankLLaMA base_model, or name it in {self.folder}'s "
                "adapter_config.json (and reranker.json)."
            ) from error

    @property
    def modules(self) -> set[str]:
        """The names of the modules that the adapter updates."""
        return set(self._sides)

    def modules_ending_in(self, ending: str) -> set[str]:
        """Return the names of the updated modules with this ending."""
        return {module for module in self._sides if module.endswith(ending)}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless each updated module is in ``shapes``, and its update has that shape."""
        if unknown := sorted(self.modules - set(shapes)):
            raise ValueError(
                f"{self.argument}: the model has no module {short(unknown[0])} ({len(unknown)} such modules)."
            )
        for module, sides in self._sides.items():
            down, up = (self._files.shape(sides[side]) for side in "AB")
            fits = len(down) == len(up) == 2 and (up[0], down[1]) == shapes[module] and up[1] == down[0] > 0
            if not fits:
                raise ValueError(
                    f"{self.argument}: the adapter has the wrong shape: {module} is {list(shapes[module])} in the "
                    f"model, but the adapter has lora_A {list(down)} and lora_B {list(up)}."
                )

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Return the factors of a module's update, fp32 ``[rank, inputs]`` and ``[outputs, rank]``, scale included."""
        down, up = (self._read_finite(self._sides[module][side]) for side in "AB")
        rank = down.shape[0]
        alpha = self._alpha(self._full_names[module])
        scaling = alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank
        return down, up * scaling

    def read_whole(self, name: str) -> Tensor:
        """Read a tensor that was trained whole, as fp32.

        Raises:
            ValueError: it has values that are not finite.
        """
        return self._read_finite(self.whole[name])

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that was trained whole."""
        return self._files.shape(self.whole[name])

    def _read_finite(self, key: str) -> Tensor:
        tensor = self._files.read(key).float()
        if not tensor.isfinite().all():
            raise ValueError(f"{self.argument}: not all values of tensor {key!r} are finite.")
        return tensor

    def _alpha(self, module: str) -> float:
        """Return a module's ``lora_alpha``."""
        alpha = self._by_pattern("alpha", module, "lora_alpha", LORA_ALPHA)
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not number or not -MAX_ALPHA < alpha < MAX_ALPHA:
            raise ValueError(
                f"{self.argument}: lora_alpha of {short(module)} is {short(alpha)}, by lora_alpha or alpha_pattern; "
                "expected a number."
            )
        return float(alpha)

    def _by_pattern(self, name: str, module: str, field: str, default: int) -> Any:
        """Return a module's setting: by PEFT's ``<name>_pattern``, which has regular expressions, else by ``field``."""
        patterns = self.config.get(f"{name}_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{self.argument}: {name}_pattern is {short(patterns)}; expected an object.")
        for pattern, value in patterns.items():
            if self._fits(f"{name}_pattern", pattern, module):
                return value
        return self.config.get(field, default)

    def _fits(self, field: str, pattern: str, module: str) -> bool:
        """Tell whether a pattern matches the end of a module's name; ValueError if it is too complex or malformed."""
        if len(pattern) > 1000 or len(WILDCARDS.findall(pattern)) > 2:  # a match could take forever
            raise ValueError(f"{self.argument}: {field} {short(pattern)} is too complex.")
        try:
            return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{self.argument}: {field} {short(pattern)}: {error}.") from error
