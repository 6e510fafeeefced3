r"""Measure everything on one GPU, unattended and in a given time, and print Markdown tables.

    python examples/benchmarks/gpu.py                       # in 8 minutes, on a GPU of 80 GB
    python examples/benchmarks/gpu.py --minutes 3 --json figures.json
    python examples/benchmarks/gpu.py --only attention "profile of the 7B"  # some sections, by the start of their names
    python examples/benchmarks/gpu.py --attention sdpa      # all scoring with another attention kernel
    python examples/benchmarks/gpu.py --tiny --minutes 0.2  # tiny shapes, to try the program on a CPU

Weights are random and made on the device, texts are random words: nothing is downloaded and no data is needed. The
shapes are those of Mistral-7B and SmolLM2-135M, in bf16. CrossEncoder and plain transformers score the same pairs with
the same weights. Systems of a section take turns, and medians are printed. A section that fails prints its traceback
and is listed at the end; the next section runs. Sections for which no time is left are listed too. The figures of each
section are printed as soon as they are known.

Each section's seconds are a share of the minutes; making models and compiling take time of their own. PyTerrier is not
needed.
"""

# ruff: noqa: E402 # the environment is set before torch is imported
from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
ROOT = Path(__file__).resolve().parent.parent.parent
if importlib.util.find_spec("pyterrier_llmrerank") is None:
    sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("pyterrier") is None:  # engine and training run without it, the package's rerankers do not
    sys.modules["pyterrier"] = types.ModuleType("pyterrier")
    for name in ("pyterrier_llmrerank", "pyterrier_llmrerank.training"):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
        sys.modules[name] = package

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForSequenceClassification, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from pyterrier_llmrerank.checkpoints.rankllama_checkpoint import RankLLaMACheckpoint
from pyterrier_llmrerank.engine import attention, attention_kernels, elementwise, scoring
from pyterrier_llmrerank.engine.cascade import Cascade
from pyterrier_llmrerank.engine.flops import Operations
from pyterrier_llmrerank.engine.inputs import Ids, token_ids
from pyterrier_llmrerank.engine.packing import PackedPairs
from pyterrier_llmrerank.engine.scoring import Scorer
from pyterrier_llmrerank.engine.shape import Shape
from pyterrier_llmrerank.engine.usage import Observer, Usage
from pyterrier_llmrerank.engine.weights import Weights

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: SDPA's backends in order of preference, None for torch's own choice. Other names are kernels of the package.
BACKENDS: dict[str, list[SDPBackend] | None] = {
    "torch": None,
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "math": [SDPBackend.MATH],
}

#: In place of a kernel's name: the package's choice of attention, and element-wise work by torch.
WITHOUT_TRITON = "without Triton"


# -- models and texts


def configuration(name: str, tiny: bool) -> Any:
    """The shape of a model by its name; if ``tiny``, a small one of the same family."""
    common: dict[str, Any] = {"num_labels": 1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    family: Any = MistralConfig if name == "7B" else LlamaConfig
    common |= {"sliding_window": None} if name == "7B" else {"tie_word_embeddings": True}
    if tiny:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        return family(vocab_size=256, num_hidden_layers=6, **sizes, **common)
    if name == "7B":
        return family(vocab_size=32000, **common)  # its defaults are Mistral-7B's
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return family(vocab_size=49152, num_hidden_layers=30, **sizes, **common)


def tokenizer_of(words: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word."""
    vocabulary = {"<pad>": 0, "<unk>": 1, "Yes": 2, **{f"w{number}": number for number in range(3, words)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


def texts(queries: int, passages: int, tokens: int, words: int) -> list[tuple[str, str]]:
    """Pairs of random words, ``tokens`` a pair in the mean: a query of eight words, passages of various lengths."""
    draw = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(f"w{number}" for number in draw.integers(3, words, length))

    pairs = []
    for _ in range(queries):
        query = text(8)
        lengths = (draw.normal(1.0, 0.35, passages).clip(0.3, 2.0) * (tokens - 8)).astype(int).clip(1)
        pairs += [(query, text(int(length))) for length in lengths]
    return pairs


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
    """A query and its passage, without a suffix."""
    parts = zip(token_ids(tokenizer, [q for q, _ in pairs]), token_ids(tokenizer, [p for _, p in pairs]), strict=True)
    return [Ids(query, passage, []) for query, passage in parts]


class RandomCheckpoint:
    """The weights of a model that transformers made, as a checkpoint of this package; there are no files.

    A head reads the states after each layer, for Matroyshka's shapes.
    """

    argument, base, adapter, adapters, overlay, layer_wise = "random weights", "random/weights", None, (), (), False
    files = types.SimpleNamespace(release=lambda: None)
    supports_layerwise = True

    def __init__(self, model: Any, tokenizer: Any, heads: int | None = None) -> None:
        self.config = copy.deepcopy(model.config)
        self.layers = int(model.config.num_hidden_layers)
        self.head_layers = range(1, self.layers + 1) if heads is None else range(self.layers, self.layers + 1)
        self._tokenizer = tokenizer
        self._tensors = dict(model.model.state_dict())
        self._head = model.score.weight.detach().float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def place(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return self._tensors[name].to(device=device, dtype=dtype, copy=True)

    def heads(self, tokenizer: Any = None) -> torch.Tensor:
        return self._head.repeat(len(self.head_layers), 1)

    def tokenizer(self) -> Any:
        return self._tokenizer

    def head_module(self, index: int) -> None:
        return None

    def blame_config(self) -> Any:
        return nullcontext()

    def check_depth(self, *_: Any) -> None:
        """Files would be checked here; there are none."""

    check_weights = check_unused = check_adapters = check_depth


class Counter(Observer):
    """Adds up the usage of a call."""

    def __init__(self) -> None:
        self.usage = Usage()

    def used(self, usage: Usage) -> None:
        self.usage = self.usage + usage


# -- the run


@dataclass
class System:
    """A way to score the pairs, with its measurements."""

    name: str
    score: Callable[[], np.ndarray]
    operations: float = 0.0
    seconds: list[float] = field(default_factory=list)
    scores: Any = None
    gigabytes: float = 0.0


class Bench:
    """Runs sections, and keeps what they find."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.tiny = chosen.tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.total = 60.0 * chosen.minutes
        self.begun = time.perf_counter()
        self.only = chosen.only
        self.json = chosen.json
        self.attention = chosen.attention
        self.dtype = torch.bfloat16
        self.pairs_of_query = 6 if self.tiny else 100
        self.queries = 2 if self.tiny else 4
        self.tokens = 24 if self.tiny else 200
        self.peak = float("nan")
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.failed: list[dict[str, str]] = []
        self.times: dict[str, float] = {}

    @property
    def left(self) -> float:
        return self.total - (time.perf_counter() - self.begun)

    def wanted(self, title: str) -> bool:
        return not self.only or any(title.startswith(name) for name in self.only)

    def section(
        self, title: str, needs: float, run: Callable[[float], None], share: float = 0.0, always: bool = False
    ) -> None:
        """Run a section if there is time, and keep its failure from the others.

        Args:
            title: its name.
            needs: seconds that it takes at least, on a GPU.
            run: takes the seconds that its measurements may take.
            share: these, as a part of all minutes.
            always: run it whatever sections are wanted.
        """
        if not (always or self.wanted(title)):
            return
        if not self.tiny and self.left < needs:
            self.failed.append({"section": title, "reason": f"{self.left:.0f} s left, it needs {needs:.0f}"})
            print(f"\n## {title}: no time left", flush=True)
            return
        began = time.perf_counter()
        print(f"\n## {title}", flush=True)
        try:
            run(min(share * self.total, max(self.left - needs, 0.0)))
        except (Exception, SystemExit) as error:
            traceback.print_exc(file=sys.stdout)
            said = str(error).strip().splitlines() or [""]
            self.failed.append({"section": title, "reason": f"{type(error).__name__}: {said[0][:150]}"})
        self.times[title] = time.perf_counter() - began
        print(f"\n({self.times[title]:.1f} s)", flush=True)
        self.save()
        self.tidy()

    def save(self) -> None:
        """Write the figures so far."""
        if self.json is not None:
            figures = {"machine": head(self), "tables": self.tables, "not measured": self.failed, "seconds": self.times}
            self.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")

    def tidy(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def clock(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        start = self.clock()
        made = function()
        return self.clock() - start, made

    def median(self, function: Callable[[], Any], seconds: float, most: int = 30) -> float:
        """The median time of a function after one call, in about so many seconds."""
        function()
        taken: list[float] = []
        while len(taken) < 3 or (sum(taken) < seconds and len(taken) < most):
            taken.append(self.timed(function)[0])
        return statistics.median(taken)

    def show(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Keep a table, and print it."""
        self.tables[title] = rows
        print("\n" + markdown(rows), flush=True)

    def in_turns(self, systems: list[System], seconds: float) -> list[System]:
        """Time systems in turns; those that fail are left out, with a line that says so."""
        able = []
        for system in systems:
            try:
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                first, _ = self.timed(system.score)  # loads, compiles, plans
                taken, system.scores = self.timed(system.score)
                system.seconds.append(taken)
                system.gigabytes = memory(self.device)
                print(f"{system.name}: first {first:.2f} s, then {taken:.2f} s", flush=True)
                able.append(system)
            except Exception as error:
                traceback.print_exc(file=sys.stdout)
                reason = (str(error).strip().splitlines() or [""])[0][:150]
                self.failed.append({"section": system.name, "reason": f"{type(error).__name__}: {reason}"})
                self.tidy()
        once = sum(system.seconds[0] for system in able)
        for _ in range(int(min(6, max(0, seconds / max(once, 1e-9) - 2)))):
            for system in able:
                system.seconds.append(self.timed(system.score)[0])
        return able

    def rows(self, systems: list[System], pairs: int, reference: str | None = None) -> list[dict[str, Any]]:
        """Pairs a second, times the reference's, operations and differences."""
        named = {system.name: system for system in systems}
        other = named.get(reference or "")
        rows = []
        for system in systems:
            seconds = statistics.median(system.seconds)
            row: dict[str, Any] = {"system": system.name, "pairs/s": round(pairs / seconds, 1)}
            row["rounds"] = len(system.seconds)
            if other is not None:
                ratio = statistics.median(other.seconds) / seconds
                row[f"times {other.name}"] = round(ratio, 2)
            if system.operations:
                row["GFLOP a pair"] = round(system.operations / pairs / 1e9, 2)
                row["TFLOP/s"] = round(system.operations / seconds / 1e12, 3)
                row["of the peak"] = round(system.operations / seconds / self.peak, 3)
            row["GB"] = round(system.gigabytes, 1)
            rows.append(row)
        return rows


def memory(device: torch.device) -> float:
    """The most that was taken since the last reset, in GB."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def markdown(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; missing cells are empty."""
    if not rows:
        return "(nothing)"
    heads = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [" | ".join(str(row.get(name, "")) for name in heads) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


@contextmanager
def attending(name: str | None) -> Iterator[str | None]:
    """Let SDPA prefer a backend, in place of the package's choice; yields the name of a kernel of the package."""
    if name == WITHOUT_TRITON:
        with mock.patch.object(elementwise, "_checked", return_value=None), attending(None) as own:
            yield own
        return
    if name not in BACKENDS:
        with attention_kernels.without_cudnn():
            yield name
        return
    order = BACKENDS[name]
    with (
        mock.patch.object(scoring, "without_cudnn", nullcontext),
        nullcontext() if order is None else sdpa_kernel(order, set_priority=True),
    ):
        yield "sdpa"


# -- sections


class Model:
    """A model in transformers' form, and the same weights in ours."""

    def __init__(self, bench: Bench, name: str, layers: int | None = None) -> None:
        self.bench, self.name = bench, name
        config = configuration(name, bench.tiny)
        config.num_hidden_layers = layers or config.num_hidden_layers
        began = bench.clock()
        with torch.device(bench.device):
            self.plain = AutoModelForSequenceClassification.from_config(config, dtype=bench.dtype).eval()
        self.plain.requires_grad_(False)
        self.tokenizer = tokenizer_of(config.vocab_size)
        self.layers = config.num_hidden_layers
        self.pairs = texts(bench.queries, bench.pairs_of_query, bench.tokens, config.vocab_size)
        print(f"{name} made in {bench.clock() - began:.1f} s", flush=True)

    def weights(self, **options: Any) -> Weights:
        checkpoint: Any = RandomCheckpoint(self.plain, self.tokenizer)
        return Weights(lambda: checkpoint, self.bench.device, self.bench.dtype, **options)

    def ours(self, name: str, weights: Weights, kernel: str | None = None, **shape: Any) -> System:
        """One of this package's systems; ``prune`` keeps these shares of the candidates after layers."""
        keep = shape.pop("prune", {})
        cutoffs = shape.pop("cutoffs", (self.layers,))
        prune = {layer: max(1, int(part * self.bench.pairs_of_query)) for layer, part in keep.items()}
        cutoffs = tuple(sorted({*prune, *cutoffs}))
        heads = tuple(cutoff - 1 for cutoff in cutoffs)
        chosen = kernel or self.bench.attention

        def score() -> np.ndarray:
            with attending(chosen) as own:
                made = Shape(cutoffs, heads, prune=tuple(prune.items()), attn_implementation=own, **shape)
                scorer = Scorer((weights,), lambda _: made, encode)
                queries = [query for query, _ in self.pairs]
                place = np.arange(len(self.pairs))
                cascade = Cascade(prune, queries, place, cutoffs[-1]) if prune else None
                score.exits = cascade  # type: ignore[attr-defined]
                return scorer.score(self.pairs, Counter(), cascade)[-1]

        return System(name, score)

    def counted(self, system: System, weights: Weights, **shape: Any) -> System:
        """Count a system's operations from its shape; it has run before if it is a cascade."""
        ids = encode(self.tokenizer, self.pairs)
        queries = np.arange(len(ids)) // self.bench.pairs_of_query
        counter = Operations(weights.at_depth(self.layers)[0], ids, queries, self.bench.queries)
        prune = shape.pop("prune", {})
        read = sorted({*prune, *shape.pop("cutoffs", (self.layers,))})
        cascade = getattr(system.score, "exits", None)
        system.operations = float(counter(read, exit_layer=cascade and cascade.exit_layer, **shape).sum())
        return system

    @torch.inference_mode()
    def padded(self) -> np.ndarray:
        """Plain transformers: batches of 32, longest first, padded on the right."""
        device = self.bench.device
        ids = [pair.flat() for pair in encode(self.tokenizer, self.pairs)]
        order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
        scores = np.empty(len(ids))
        for start in range(0, len(order), 32):
            batch = order[start : start + 32]
            longest = len(ids[batch[0]])
            rows = torch.tensor([ids[index] + [0] * (longest - len(ids[index])) for index in batch])
            mask = torch.tensor([[1] * len(ids[index]) + [0] * (longest - len(ids[index])) for index in batch])
            logits = self.plain(input_ids=rows.to(device), attention_mask=mask.to(device), use_cache=False).logits
            scores[batch] = logits[:, 0].float().cpu().numpy()
        return scores

    def cross_encoder(self) -> Callable[[], np.ndarray]:
        """CrossEncoder's predict, with its defaults; it opens a tiny model, whose place the large one takes."""
        from sentence_transformers import CrossEncoder

        with tempfile.TemporaryDirectory() as folder:
            small = configuration(self.name, True)
            small.vocab_size = self.plain.config.vocab_size
            AutoModelForSequenceClassification.from_config(small).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            model = CrossEncoder(folder, device=str(self.bench.device), max_length=1024)
        module = next(part for part in model.modules() if isinstance(part._modules.get("model"), type(self.plain)))
        module.model = self.plain
        return lambda: np.asarray(
            model.predict(self.pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False), dtype=float
        ).reshape(-1)


def measure_peak(bench: Bench, seconds: float) -> None:
    """Matrix products in the 7B's largest shape, and a copy."""
    rows, inner, outer = (64, 32, 48) if bench.tiny else (16384, 4096, 14336)
    x = torch.randn(rows, inner, device=bench.device, dtype=bench.dtype)
    weight = torch.randn(outer, inner, device=bench.device, dtype=bench.dtype)
    taken = bench.median(lambda: torch.nn.functional.linear(x, weight), seconds / 4)
    bench.peak = 2.0 * rows * inner * outer / taken
    big = torch.empty((1 if bench.tiny else 1024) * 2**20, dtype=torch.uint8, device=bench.device)
    copy = bench.median(big.clone, seconds / 8)
    row = {"matrix products, TFLOP/s": round(bench.peak / 1e12, 3), "copy, GB/s": round(2 * big.numel() / copy / 1e9)}
    bench.show("Peak", [row])


def measure_scoring(bench: Bench, model: Model, weights: Weights, seconds: float) -> None:
    """Full depth, two thirds of the depth at half width, a cascade, transformers and CrossEncoder, in turns."""
    layers, quarter = model.layers, max(1, model.layers // 4)
    shapes: dict[str, dict[str, Any]] = {
        "full depth": {},
        "two thirds of the depth, ratio 2": {
            "cutoffs": (2 * layers // 3,), "compress_layers": (quarter,), "compress_ratio": 2,
        },
        "cascade: half after a quarter, a fifth after half": {"prune": {quarter: 0.5, layers // 2: 0.2}},
    }  # fmt: skip
    systems = [model.ours(name, weights, **shape) for name, shape in shapes.items()]
    systems.append(System("transformers, padded", model.padded))
    try:
        systems.append(System("CrossEncoder", model.cross_encoder()))
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        bench.failed.append({"section": f"CrossEncoder, {model.name}", "reason": f"{type(error).__name__}: {error}"})
    able = bench.in_turns(systems, seconds)
    for system in able:
        if system.name in shapes:
            model.counted(system, weights, **shapes[system.name])
    peer = "CrossEncoder" if any(system.name == "CrossEncoder" for system in able) else "transformers, padded"
    rows = bench.rows(able, len(model.pairs), peer)
    named = {system.name: system for system in able}
    for row in rows:
        if row["system"] in ("transformers, padded", "CrossEncoder") and "full depth" in named:
            difference = np.abs(named[row["system"]].scores - named["full depth"].scores)
            row["largest difference from full depth"] = f"{difference.max():.4f}"
    bench.show(f"Scoring, {model.name}", rows)


def measure_attention(bench: Bench, seconds: float) -> None:
    """One layer's attention, from packed row to packed row: a shape again and again, then shapes not seen before."""
    config = configuration("7B", bench.tiny)
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    draw = np.random.default_rng(1)

    def batch(pairs: int) -> tuple[Any, tuple[torch.Tensor, ...]]:
        lengths = (draw.normal(1.0, 0.1, pairs).clip(0.5, 1.5) * bench.tokens).astype(int)
        packed = PackedPairs([Ids([3] * 8, [4] * int(n), []) for n in lengths])
        states = [
            torch.randn(1, len(packed.ids), count, width, device=bench.device, dtype=bench.dtype).transpose(1, 2)
            for count in (heads, key_heads, key_heads)
        ]  # as a layer's projections lay them out
        return packed, tuple(states)

    count = 4 if bench.tiny else 80
    fixed = batch(count)
    others = [batch(count - number) for number in range(1, 4 if bench.tiny else 9)]
    module: Any = types.SimpleNamespace(layer_idx=0)

    def attend(given: tuple[Any, tuple[torch.Tensor, ...]], layout: Any) -> torch.Tensor:
        return attention.attention(module, *given[1], None, scaling=width**-0.5, layout=layout)[0]

    names = [None, "sdpa", "torch", "flash", "cudnn", "efficient", "math", "eager"]
    if bench.total > 400:
        names.append("flex_attention")
    rows, exact = [], None
    with torch.inference_mode():
        for name in names:
            try:
                with attending(name) as chosen:
                    kernel = attention_kernels.kernel_of(chosen, bench.device, bench.dtype, width)
                    begun = bench.clock()
                    made = [attention.Layout(given[0], bench.device, kernel=kernel) for given in others]
                    laid_out = (bench.clock() - begun) / len(others)
                    layout = attention.Layout(fixed[0], bench.device, kernel=kernel)
                    first, output = bench.timed(lambda layout=layout: attend(fixed, layout))
                    again = bench.median(lambda layout=layout: attend(fixed, layout), 0.2, most=20)
                    new = [bench.timed(lambda g=g, m=m: attend(g, m))[0] for g, m in zip(others, made, strict=True)]
                exact = output.float() if exact is None else exact
                rows.append(
                    {
                        "kernel": name or "as the package chooses",
                        "first, ms": round(1000 * first, 2),
                        "same shape, ms": round(1000 * again, 3),
                        "new shape, ms": round(1000 * statistics.median(new), 3),
                        "laying out, ms": round(1000 * laid_out, 2),
                        "largest difference": f"{(output.float() - exact).abs().max().item():.4f}",
                    }
                )
            except Exception as error:
                said = (str(error).strip().splitlines() or [""])[0][:100]
                print(f"{name}: {type(error).__name__}: {said}", flush=True)
                rows.append({"kernel": name or "default", "first, ms": f"{type(error).__name__}: {said}"})
                bench.tidy()
    bench.show("Attention, one layer of the 7B", rows)


def measure_kernels(bench: Bench, model: Model, weights: Weights, seconds: float) -> None:
    """Full depth, end to end, with each kernel."""
    names = [None, WITHOUT_TRITON, "sdpa", "torch", "cudnn"] if bench.device.type == "cuda" else [None, "math", "eager"]
    systems = [model.ours(name or "as the package chooses", weights, kernel=name) for name in names]
    able = bench.in_turns(systems, seconds)
    rows = bench.rows(able, len(model.pairs))
    for row, system in zip(rows, able, strict=True):
        row["largest difference"] = f"{np.abs(system.scores - able[0].scores).max():.4f}"
    bench.show(f"Attention kernels, end to end, {model.name}", rows)


def measure_options(bench: Bench, model: Model, weights: Weights, seconds: float) -> None:
    """Eight bits, if torchao is there; compiled layers, if there is time."""
    options: list[dict[str, Any]] = []
    if importlib.util.find_spec("torchao") is None:
        print("torchao is not installed: int8 and float8 are not measured")
        bench.failed.append({"section": f"int8 and float8, {model.name}", "reason": "torchao is not installed"})
    else:
        options += [{"quantization": "int8"}, {"quantization": "float8"}]
    if bench.left > 150 and not bench.tiny:
        options.append({"torch_compile": True})
        if len(options) > 1:
            options.append({"quantization": "float8", "torch_compile": True})
    systems = [model.ours("bf16", weights)]
    for chosen in options:
        name = ", ".join(str(value) if key == "quantization" else "compiled" for key, value in chosen.items())
        try:
            systems.append(model.ours(name, model.weights(**chosen)))
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            bench.failed.append({"section": f"{name}, {model.name}", "reason": f"{type(error).__name__}: {error}"})
    able = bench.in_turns(systems, seconds)
    rows = bench.rows(able, len(model.pairs), "bf16")
    for row, system in zip(rows, able, strict=True):
        row["largest difference"] = f"{np.abs(system.scores - able[0].scores).max():.4f}"
    bench.show(f"Options, {model.name}", rows)


#: Kinds of kernels by parts of their names, the first that fits.
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention", "softmax"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "mm", "linear"),
    "gathers and copies": ("index", "gather", "copy", "cat", "memcpy", "scatter", "repeat"),
}


def measure_profile(bench: Bench, model: Model, weights: Weights, seconds: float) -> None:
    """Where the device's time goes at full depth, by kinds of kernels, and the share of time in which it is busy."""
    from torch.profiler import ProfilerActivity, profile

    system = model.ours("full depth", weights)
    system.score()
    on_gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        taken, _ = bench.timed(system.score)
    events = [
        (str(event.key), float(event.self_device_time_total if on_gpu else event.self_cpu_time_total), int(event.count))
        for event in recorded.key_averages()
    ]
    events = sorted((event for event in events if event[1] > 0), key=lambda event: -event[1])
    busy = sum(time_ for _, time_, _ in events)
    kinds: dict[str, list[float]] = {}
    for name, time_, count in events:
        lower = name.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "element-wise")
        sums = kinds.setdefault(kind, [0.0, 0])
        sums[0] += time_
        sums[1] += count
    rows = [
        {"kind": kind, "of the device's time": f"{part / busy:.1%}", "ms": round(part / 1000, 1), "kernels": int(n)}
        for kind, (part, n) in sorted(kinds.items(), key=lambda item: -item[1][0])
    ]
    rows.append({"kind": "busy, of the wall time", "of the device's time": f"{busy / 1e6 / taken:.1%}"})
    bench.show(f"Profile, full depth, {model.name}", rows)
    largest = [
        {"kernel": name[:90].replace("|", "/"), "share": f"{part / busy:.1%}", "calls": n}
        for name, part, n in events[:14]
    ]
    bench.show(f"Largest kernels, full depth, {model.name}", largest)


def measure_opening(bench: Bench, seconds: float) -> None:
    """Open some layers of the 7B from files, with a LoRA adapter to merge and without."""
    config = configuration("7B", bench.tiny)
    whole = config.num_hidden_layers
    config.num_hidden_layers = layers = 2 if bench.tiny else 4
    with tempfile.TemporaryDirectory() as temporary:
        base, lora = Path(temporary, "base"), Path(temporary, "adapter")
        with torch.device(bench.device):
            model = AutoModelForSequenceClassification.from_config(config, dtype=bench.dtype)
        model.cpu().save_pretrained(base)
        tokenizer_of(config.vocab_size).save_pretrained(base)
        tensors = {}
        for name, part in model.named_modules():
            if name.rpartition(".")[2] in PROJECTIONS:
                outputs, inputs = part.weight.shape
                tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(32, inputs) * 0.01
                tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, 32) * 0.01
        tensors["base_model.model.score.weight"] = model.score.weight.detach().float()
        lora.mkdir()
        save_file(tensors, lora / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 32, "lora_alpha": 64}
        settings |= {"base_model_name_or_path": str(base), "target_modules": list(PROJECTIONS)}
        (lora / "adapter_config.json").write_text(json.dumps(settings))
        del model
        rows = []
        for name, folder, of in (("merged model", base, None), ("base and LoRA of rank 32", lora, str(base))):
            taken = []
            for _ in range(2):
                weights = Weights(
                    lambda folder=folder, of=of: RankLLaMACheckpoint(str(folder), of), bench.device, bench.dtype
                )
                started, _ = bench.timed(lambda weights=weights: weights.at_depth(0))
                loaded, _ = bench.timed(lambda weights=weights: weights.at_depth(layers))
                taken.append((started, loaded / layers))
                del weights
            start, layer = (statistics.median(column) for column in zip(*taken, strict=True))
            rows.append(
                {
                    "opened": name,
                    "before the first layer, s": round(start, 2),
                    "a layer, s": round(layer, 3),
                    f"all {whole} layers, by these, s": round(start + whole * layer, 1),
                }
            )
    bench.show("Opening the 7B, files in memory", rows)


def measure_training(bench: Bench, name: str, seconds: float, layers: int | None = None) -> None:
    """Steps of RankLLaMA's recipe with LoRA: forward, backward and optimiser; ours, and transformers with PEFT."""
    from peft import LoraConfig, get_peft_model

    from pyterrier_llmrerank.training import RankLLaMATraining
    from pyterrier_llmrerank.training.lora import with_lora

    size, groups = (2, 2) if bench.tiny else (8, 2 if name == "7B" else 8)
    model = Model(bench, name, layers)
    packed = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(model.pairs))[: size * groups]
        rows = encode(model.tokenizer, [model.pairs[index] for index in order])
        by_query = [row._replace(prefix=rows[number - number % size].prefix) for number, row in enumerate(rows)]
        packed.append(PackedPairs(by_query))
    tokens = sum(int(one.lengths.sum()) for one in packed) / len(packed)
    target = torch.zeros(groups, dtype=torch.long, device=bench.device)

    def ours(trained: Any) -> Callable[[PackedPairs], torch.Tensor]:
        return lambda batch: trained(batch)[0].view(groups, size)

    def plain(trained: Any) -> Callable[[PackedPairs], torch.Tensor]:
        def logits(batch: PackedPairs) -> torch.Tensor:
            mask = torch.arange(batch.longest) < torch.from_numpy(batch.lengths)[:, None]
            ids = torch.from_numpy(batch.ids[batch.places]).masked_fill(~mask, 0)
            on = bench.device
            return trained(input_ids=ids.to(on), attention_mask=mask.long().to(on)).logits.float().view(groups, size)

        return logits

    def build(kind: str) -> Any:
        recipe = RankLLaMATraining(group_size=size, lora_dropout=0.0)
        if kind == "this package":
            checkpoint: Any = RandomCheckpoint(model.plain, model.tokenizer, heads=1)
            return with_lora(checkpoint, checkpoint.heads(), recipe, bench.dtype).to(bench.device)
        config = LoraConfig(
            task_type="SEQ_CLS", r=recipe.lora_rank, lora_alpha=int(recipe.lora_alpha),
            target_modules=list(recipe.target_modules),
        )  # fmt: skip
        return get_peft_model(model.plain, config)

    rows = []
    for kind in ("this package", "transformers and PEFT"):
        label, trained = kind, None
        try:
            bench.tidy()
            trained = build(kind).train()
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            forward = (ours if kind == "this package" else plain)(trained)
            rows.append({"program": label, **train(bench, trained, forward, packed, target, tokens, seconds / 3)})
            print(rows[-1], flush=True)
            if name == "7B" and kind == "this package":
                label += ", gradient checkpointing"
                trained.get_base_model().gradient_checkpointing_enable()
                bench.tidy()
                rows.append({"program": label, **train(bench, trained, forward, packed, target, tokens, seconds / 3)})
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            said = (str(error).strip().splitlines() or [""])[0][:150]
            bench.failed.append({"section": f"Training {name}, {label}", "reason": f"{type(error).__name__}: {said}"})
        trained = forward = None
    depth = f", {model.layers} layers" if layers else ""
    bench.show(
        f"Training {name}{depth}: LoRA, {groups} groups of {size}, {tokens / size / groups:.0f} tokens a pair", rows
    )


def train(
    bench: Bench, trained: Any, forward: Callable[[PackedPairs], torch.Tensor], packed: list[PackedPairs],
    target: torch.Tensor, tokens: float, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Time steps of a model."""
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-5)
    taken: list[float] = []
    losses: list[float] = []

    def step() -> None:
        batch = packed[len(taken) % len(packed)]
        optimizer.zero_grad()
        with torch.autocast(bench.device.type, bench.dtype):
            loss = torch.nn.functional.cross_entropy(forward(batch), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    for _ in range(2):
        step()
    while len(taken) < 3 or (sum(taken) < seconds and len(taken) < 12):
        taken.append(bench.timed(step)[0])
    middle = statistics.median(taken)
    return {
        "tokens/s": round(tokens / middle), "pairs/s": round(len(packed[0]) / middle, 1), "steps": len(taken),
        "GB": round(memory(bench.device), 1), "first loss": round(losses[0], 4), "last loss": round(losses[-1], 4),
    }  # fmt: skip


# -- all of it


def head(bench: Bench) -> str:
    """The machine and the versions."""
    card = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    for package in ("peft", "sentence-transformers", "torchao"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    work = f"{bench.queries} queries of {bench.pairs_of_query} pairs, {bench.tokens} tokens a pair in the mean, bf16"
    return f"{card}; {', '.join(versions)}; {work}; medians"


#: Sections of a model: title, seconds that it needs with a 7B, share of the minutes, and what it runs.
SECTIONS: list[tuple[str, float, float, Callable[[Bench, Model, Weights, float], None]]] = [
    ("scoring", 20, 0.2, measure_scoring),
    ("kernels", 12, 0.08, measure_kernels),
    ("profile", 8, 0.02, measure_profile),
    ("options", 90, 0.1, measure_options),
]


def measure_model(bench: Bench, name: str, scale: float) -> None:
    """Make a model and run its sections; a smaller one needs that part of the 7B's time."""
    titles = {f"{title} of the {name}": rest for title, *rest in SECTIONS if name == "7B" or title != "options"}
    if not any(map(bench.wanted, titles)):
        return
    made: list[tuple[Model, Weights]] = []

    def make(seconds: float) -> None:
        model = Model(bench, name)
        weights = model.weights()
        taken, _ = bench.timed(lambda: weights.at_depth(model.layers))
        print(f"copied into the package's layers in {taken:.1f} s")
        made.append((model, weights))

    bench.section(f"making the {name}", 15 * scale, make, always=True)
    for title, (needs, share, run) in titles.items() if made else ():
        bench.section(title, needs * scale, lambda seconds, run=run: run(bench, *made[0], seconds), share * scale)
    made.clear()
    bench.tidy()


def main(arguments: Sequence[str] | None = None) -> Bench:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it, about; 3 or more on a GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, as a trial")
    parser.add_argument("--only", nargs="*", help="sections whose names start with one of these")
    kinds = f"{', '.join(BACKENDS)} of SDPA, or an attn_implementation"
    parser.add_argument("--attention", help=f"kernel of all scoring: {kinds}")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    bench = Bench(chosen)
    said = head(bench)
    print(said, flush=True)

    bench.section("peak", 5, lambda seconds: measure_peak(bench, seconds), 0.01)
    measure_model(bench, "7B", 1.0)
    bench.section("attention", 8, lambda seconds: measure_attention(bench, seconds), 0.03)
    measure_model(bench, "135M", 0.3)
    bench.section("opening", 15, lambda seconds: measure_opening(bench, seconds))
    bench.section("training the 135M", 12, lambda seconds: measure_training(bench, "135M", seconds), 0.06)
    layers = 2 if bench.tiny else 8 if bench.left < 100 else None
    bench.section("training the 7B", 25, lambda seconds: measure_training(bench, "7B", seconds, layers), 0.12)

    print(f"\n\n# All figures\n\n{said}")
    for title, rows in bench.tables.items():
        print(f"\n## {title}\n\n{markdown(rows)}")
    print(f"\n## Not measured\n\n{markdown(bench.failed)}")
    print(
        f"\n{time.perf_counter() - bench.begun:.0f} s in all: "
        + ", ".join(f"{t} {s:.0f}" for t, s in bench.times.items())
    )
    return bench


if __name__ == "__main__":
    main()
