r"""Measure how fast reranking is, beside other programs with the same weights, texts, precision and threads.

    python examples/benchmarks/scoring.py FOLDER --candidates 100 --queries 1
    python examples/benchmarks/scoring.py FOLDER --queries 10 --random_layers 32 --matroyshka '' \
        --quantization float8 --torch_compile --json gpu.json --plot gpu.png  # 7B, on one GPU of 80 GB
    python examples/benchmarks/scoring.py FOLDER --peers --quantization float8 --torch_compile  # options alone

FOLDER is as for rerank_run.py. Peers of RankLLaMA: (a) CrossEncoder with its defaults (pip install
sentence-transformers), (b) transformers' sequence classification padded and cut to 194 tokens, the original's
maximum. Peer of Matroyshka: (c) padded batches through eager attention with full attention matrices, as in the
released code. "20/2" means twenty layers, with passages pooled two to one after layer 8. The options --quantization,
--torch_compile and --attn_implementation add both rerankers with these options, marked "+". All systems take turns
for some rounds, and medians are printed. Tokens are counted without padding, and a query's in each of its pairs, so
that all systems that read the same texts have the same number. Operations are counted by torch, which does not see
all operations of compiled or quantised layers. The share of the peak compares with matrix products of the model's own
shapes in the same run, packed by oneDNN where that is faster. The floor is the time of these products for RankLLaMA's
tokens, without padding and with each query once.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, MistralConfig

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints.input_format import InputFormat
from pyterrier_llmrerank.checkpoints.locate import folder_of
from pyterrier_llmrerank.engine.batching import TOKENS
from pyterrier_llmrerank.engine.flops import Operations
from pyterrier_llmrerank.engine.inputs import Ids, MatroyshkaInputs
from pyterrier_llmrerank.engine.linears import PackedLinear, can_pack
from pyterrier_llmrerank.engine.weights import fill

sys.path.insert(0, str(Path(__file__).parent.parent))
from rerank_run import load, with_title

Scorer = Callable[[], np.ndarray]
LONGEST = 4096  # tokens of a text: more than any has, so that only (b) cuts


def attention_operations(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of whole matrices, causal or not, as torch counts other attention; it does not count the CPU's."""
    batch, heads, asked, width = query
    return int(2 * batch * heads * asked * key[2] * (width + value[3]))


ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_operations}


@dataclass
class System:
    """A way to score the candidates, with its measurements."""

    name: str
    score: Scorer
    dtype: torch.dtype
    reads: LLMReranker  # the texts that this one reads
    seconds: list[float] = field(default_factory=list)
    operations: int = 0


def cross_encoder(folder: Path, candidates: pd.DataFrame, dtype: torch.dtype, device: str) -> Scorer:
    """(a): ``CrossEncoder(...).predict`` with its defaults."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), max_length=2 * LONGEST, device=device, model_kwargs={"dtype": dtype})
    model.tokenizer.pad_token = model.tokenizer.pad_token or model.tokenizer.eos_token
    model.model.config.pad_token_id = model.tokenizer.pad_token_id
    bos = model.tokenizer.bos_token or ""
    texts = texts_of(candidates, bos)
    return lambda: np.asarray(
        model.predict(texts, activation_fn=torch.nn.Identity(), show_progress_bar=False), dtype=float
    )


def classifier(folder: Path, candidates: pd.DataFrame, dtype: torch.dtype, device: str) -> Scorer:
    """(b): batches of 32 padded to the maximum length, in the order they come."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = texts_of(candidates, tokenizer.bos_token or "")

    @torch.inference_mode()
    def score() -> np.ndarray:
        found = []
        for start in range(0, len(texts), 32):
            queries, passages = zip(*texts[start : start + 32], strict=True)
            batch = tokenizer(
                list(queries), list(passages), padding="max_length", max_length=194, truncation="only_second",
                return_tensors="pt", add_special_tokens=False,
            )  # fmt: skip
            found.append(model(**batch.to(device)).logits[:, 0].float().cpu().numpy())
        return np.concatenate(found)

    return score


def texts_of(candidates: pd.DataFrame, bos: str) -> list[tuple[str, str]]:
    """Queries and passages as RankLLaMA reads them."""
    passages = map(InputFormat().body, candidates["text"], candidates["title"])
    return [(f"{bos}query: {q}", bos + p) for q, p in zip(candidates["query"], passages, strict=True)]


def straightforward(
    reranker: MatroyshkaReranker, candidates: pd.DataFrame, dtype: torch.dtype, device: str, cutoff: int,
    compress_layers: Sequence[int], ratio: int,
) -> Scorer:  # fmt: skip
    """(c): batches of 32, longest first, padded, whole attention matrices kept for the pooling weights."""
    weights = reranker.scorer().weights[0]
    _, heads, tokenizer = weights.at_depth(cutoff)
    config = weights.checkpoint.config.__class__.from_dict(weights.checkpoint.config.to_dict())
    with torch.device("meta"):
        model: Any = AutoModel.from_config(config, attn_implementation="eager")
    fill(model, weights.checkpoint, "", torch.device(device), dtype)
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    model = model.to(dtype).eval()
    head = heads[weights.checkpoint.head_layers.index(cutoff)]
    pairs = list(zip(candidates["query"], candidates["text"], strict=True))

    def pooled(hidden: torch.Tensor, attention: torch.Tensor, rows: list[Ids]) -> tuple[torch.Tensor, list[Ids]]:
        """PackedPairs pooled one by one by the attention of their last token."""
        made, after = [], []
        for row, states, weight in zip(rows, hidden, attention.sum(1), strict=True):
            start, end, length = len(row.prefix), len(row.prefix) + len(row.body), row.length
            groups = zip(states[start:end].split(ratio), weight[length - 1, start:end].split(ratio), strict=True)
            means = [(g * (w / w.sum())[:, None]).sum(0) for g, w in groups]
            made.append(torch.cat([states[:start], *(m[None] for m in means), states[end:length]]))
            after.append(row._replace(body=row.body[: len(means)]))
        return torch.nn.utils.rnn.pad_sequence(made, batch_first=True), after

    @torch.inference_mode()
    def score() -> np.ndarray:
        ids = MatroyshkaInputs(max_length=LONGEST)(tokenizer, pairs)
        order = sorted(range(len(ids)), key=lambda i: -ids[i].length)
        scores = np.empty(len(ids))
        for start in range(0, len(order), 32):
            batch = order[start : start + 32]
            rows = [ids[i] for i in batch]
            longest = rows[0].length
            padded = torch.tensor([row.flat() + [0] * (longest - row.length) for row in rows], device=device)
            hidden = model.embed_tokens(padded)
            attention = torch.empty(0)
            for index in range(cutoff):
                if index in compress_layers and ratio > 1:
                    hidden, rows = pooled(hidden, attention, rows)
                length = hidden.shape[1]
                positions = torch.arange(length, device=device)[None]
                mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)
                caught: list[torch.Tensor] = []
                layer = model.layers[index]
                hook = layer.self_attn.register_forward_hook(lambda m, a, out, caught=caught: caught.append(out[1]))
                rotary = model.rotary_emb(hidden, position_ids=positions)
                hidden = layer(
                    hidden, attention_mask=mask[None, None], position_ids=positions, position_embeddings=rotary
                )
                hook.remove()
                attention = caught[0]
            last = torch.tensor([row.length - 1 for row in rows], device=device)
            states = model.norm(hidden[torch.arange(len(rows), device=device), last])
            scores[batch] = (states.float() @ head).cpu().numpy()
        return scores

    return score


def random_model(folder: Path, layers: int, device: str) -> None:
    """A RankLLaMA in the shape of Mistral-7B, with random weights in bf16 and the small model's tokenizer."""
    config = MistralConfig(
        num_hidden_layers=layers, num_labels=1, pad_token_id=0, vocab_size=49152, sliding_window=None
    )
    with torch.device(device):
        AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder_of("smollm2-135m", "model")).save_pretrained(folder)
    without_chat(folder)


def without_chat(folder: Path) -> None:
    """Take the tokenizer's chat template away, or CrossEncoder scores a chat."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def ours(reranker: LLMReranker, candidates: pd.DataFrame) -> Scorer:
    """Score with a reranker of this package, frame to frame."""
    return lambda: reranker(candidates)["score"].to_numpy()


@torch.inference_mode()
def peak(config: Any, dtype: torch.dtype, device: str, tokens: int) -> float:
    """Operations a second of matrix products in the model's shapes, each as often as the model has it."""
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = [(width, queries), (queries, width), (width, keys), (width, keys), *[(width, inner)] * 2, (inner, width)]
    operations = 2 * tokens * sum(a * b for a, b in shapes)
    states = [torch.randn(tokens, a).to(device, dtype) for a, _ in shapes]
    layers: list[nn.Linear] = [nn.Linear(a, b, bias=False, device=device, dtype=dtype) for a, b in shapes]
    kinds = [layers]
    if can_pack(torch.device(device), dtype):
        kinds.append([PackedLinear(a, b, bias=False, dtype=dtype) for a, b in shapes])
        for packed in kinds[1]:
            packed.pack()
    taken: list[list[float]] = [[] for _ in kinds]
    for _ in range(12):
        for seconds, kind in zip(taken, kinds, strict=True):
            start = clock(device)
            for layer, x in zip(kind, states, strict=True):
                layer(x)
            seconds.append(clock(device) - start)
    return operations / min(statistics.median(seconds[2:]) for seconds in taken)


def least_operations(reranker: LLMReranker, candidates: pd.DataFrame) -> float:
    """Count the operations of a reranker that no program can leave out: no padding, and each query once."""
    scorer = reranker.scorer()
    pairs = texts_of(candidates, "")
    pairs = list(zip(candidates["query"], (passage for _, passage in pairs), strict=True))
    numbers = pd.factorize(candidates["qid"])[0]
    counted = Operations(scorer.open(), scorer.ids(pairs), numbers, numbers.max() + 1)
    return float(counted(scorer.shape.cutoffs).sum())


def clock(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_to_open(model: str, dtype: str) -> tuple[float, float]:
    """Importing the package, and opening a model for a first score, each in a process of its own."""
    programs = (
        "import pyterrier, time; t = time.perf_counter(); import pyterrier_llmrerank",
        "import pyterrier, time, torch, transformers; from pyterrier_llmrerank import RankLLaMAReranker as R; "
        f"t = time.perf_counter(); R({model!r}, dtype={dtype!r}).compute_score(('a', 'b'))",
    )
    found = []
    for program in programs:
        out = subprocess.run(
            [sys.executable, "-c", program + "; print(time.perf_counter() - t)"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(float(out.stdout.split()[-1]))
    return found[0], found[1]


def most_memory() -> float:
    """Of the device if it has its own, else of the process, in GB; until now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure(systems: list[System], rounds: int, device: str) -> dict[str, np.ndarray]:
    """Count each system's operations, run it once more for what is compiled, then let them take turns."""
    scores = {}
    for system in systems:
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            system.score()
        system.operations = counter.get_total_flops()
        scores[system.name] = system.score()
    for _ in range(rounds):
        for system in systems:
            start = clock(device)
            system.score()
            system.seconds.append(clock(device) - start)
    return scores


def report(systems: list[System], pairs: int, best: dict[torch.dtype, float]) -> pd.DataFrame:
    """Tabulate pairs, tokens and operations of each system."""
    rows = []
    for system in systems:
        seconds, used = statistics.median(system.seconds), system.reads.usage
        rows.append(
            {
                "system": system.name,
                "pairs/s": round(pairs / seconds, 2),
                "tokens/s": round(used.filled / used.pairs * pairs / seconds),
                "GFLOP a pair": round(system.operations / pairs / 1e9, 2),
                "share of peak": round(system.operations / seconds / best[system.dtype], 2),
            }
        )
    return pd.DataFrame(rows)


def beside(systems: list[System], comparisons: list[tuple[str, str]], scores: dict[str, np.ndarray]) -> pd.DataFrame:
    """Ours beside a peer: times its pairs a second (median over rounds), part of its operations, score difference."""
    named = {system.name: system for system in systems}
    rows = []
    for own, peer in ((named[a], named[b]) for a, b in comparisons if b in named):
        ratios = [p / s for p, s in zip(peer.seconds, own.seconds, strict=True)]
        rows.append(
            {
                "system": own.name,
                "peer": peer.name,
                "times its speed": round(statistics.median(ratios), 2),
                "from": round(min(ratios), 2),
                "to": round(max(ratios), 2),
                "of its operations": round(own.operations / peer.operations, 2),
                "largest difference": round(float(np.abs(scores[own.name] - scores[peer.name]).max()), 4),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", default="bm25", help="which of runs/*.res.gz")
    parser.add_argument("--queries", type=int, default=1, help="so many of the topics, from the first")
    parser.add_argument("--candidates", type=int, default=100, help="a query")
    parser.add_argument("--rankllama", default="smollm2-135m", help="as RankLLaMAReranker takes it")
    parser.add_argument("--matroyshka", default="smollm2-135m", help="as MatroyshkaReranker takes it; '' for none")
    parser.add_argument(
        "--random_layers", type=int, help="instead of --rankllama, random weights in Mistral-7B's shape, so many layers"
    )
    parser.add_argument("--cutoff", type=int, default=20, help="layers of the Matroyshka in another shape")
    parser.add_argument("--compress_layer", type=int, default=8, help="after which that one pools by two")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="*", default=["a", "b", "c"], choices=["a", "b", "c"], help="only these")
    parser.add_argument("--quantization", help="option of the rerankers, which run with and without it")
    parser.add_argument("--torch_compile", action="store_true", help="option, likewise")
    parser.add_argument("--attn_implementation", help="option, likewise")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them; needs matplotlib")
    chosen = parser.parse_args()

    _, _, candidates = load(chosen.folder, chosen.run, chosen.candidates, chosen.queries)
    titled = with_title(candidates)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, chosen.dtype)
    shared: dict[str, Any] = {"dtype": chosen.dtype, "device": device}
    flags = ("quantization", "torch_compile", "attn_implementation")
    options = {flag: value for flag in flags if (value := getattr(chosen, flag))}
    lengths = {"query_max_length": LONGEST, "passage_max_length": LONGEST}
    shape = chosen.cutoff, [chosen.compress_layer], 2
    part_name = f"Matroyshka {chosen.cutoff}/2"
    with tempfile.TemporaryDirectory() as temporary:
        merged = Path(temporary) / "model"
        if chosen.random_layers:
            random_model(merged, chosen.random_layers, device)
            chosen.rankllama = str(merged)
        rank = RankLLaMAReranker(chosen.rankllama, **lengths, **shared)
        systems = [System("RankLLaMA", ours(rank, candidates), dtype, rank)]
        if options:
            other = RankLLaMAReranker(chosen.rankllama, **lengths, **shared, **options)
            systems.append(System("RankLLaMA +", ours(other, candidates), dtype, rank))
        if not chosen.random_layers and {"a", "b"} & set(chosen.peers):
            rank.save(merged, merged=True)
            without_chat(merged)
        if "a" in chosen.peers:
            systems.append(System("(a) CrossEncoder", cross_encoder(merged, candidates, dtype, device), dtype, rank))
        if "b" in chosen.peers:
            systems.append(System("(b) padded to 194", classifier(merged, candidates, dtype, device), dtype, rank))
        if chosen.matroyshka:
            full = MatroyshkaReranker(chosen.matroyshka, max_length=LONGEST, **shared)
            part = full.at(cutoff=shape[0], compress_layers=shape[1], compress_ratio=shape[2])
            systems.append(System("Matroyshka", ours(full, titled), dtype, full))
            systems.append(System(part_name, ours(part, titled), dtype, full))
            if options:
                others = MatroyshkaReranker(chosen.matroyshka, max_length=LONGEST, **shared, **options)
                systems.append(System("Matroyshka +", ours(others, titled), dtype, full))
        for kind in dict.fromkeys([dtype, torch.float32]) if chosen.matroyshka and "c" in chosen.peers else ():
            name = f"(c) eager {kind}".replace("torch.", "")
            systems.append(System(name, straightforward(part, titled, kind, device, *shape), kind, full))
        scores = measure(systems, chosen.rounds, device)
        imported, opened = seconds_to_open(chosen.rankllama, chosen.dtype)
        config = rank.scorer().checkpoint.config
        least = least_operations(rank, candidates)
    best = {kind: peak(config, kind, device, TOKENS[device]) for kind in {system.dtype for system in systems}}
    comparisons = [("RankLLaMA", "(a) CrossEncoder"), ("RankLLaMA", "(b) padded to 194")]
    comparisons += [(part_name, f"(c) eager {kind}") for kind in dict.fromkeys([chosen.dtype, "float32"])]
    comparisons += [(f"{name} +", name) for name in ("RankLLaMA", "Matroyshka") if options]
    tables = report(systems, len(candidates), best), beside(systems, comparisons, scores)
    floor = least / best[dtype]
    tokens, padding, memory = rank.usage.tokens / rank.usage.pairs, rank.usage.padding, most_memory()

    print(f"\n{chosen.folder.name}: {len(candidates)} pairs, {chosen.candidates} a query, {chosen.dtype}, {device},")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {chosen.rounds}\n")
    for table in tables:
        print(table.to_string(index=False), end="\n\n")
    print(f"matrix products in the model's shapes: {best[dtype] / 1e9:.0f} GFLOP/s;")
    print(f"at that speed, RankLLaMA's least operations take {floor:.2f} s: {len(candidates) / floor:.1f} pairs/s,")
    print(f"of which it reaches {floor / statistics.median(systems[0].seconds):.0%}")
    print(f"RankLLaMA: {tokens:.1f} tokens computed a pair, without padding;")
    print(f"of the positions that attention lays out {padding:.1%} are padding")
    print(f"most memory of all that ran: {memory:.2f} GB")
    print(f"seconds to import the package {imported:.2f}, to open it for a first score {opened:.2f}")
    if chosen.json:
        figures = {"seconds": {s.name: s.seconds for s in systems}, "peak": best[dtype], "pairs": len(candidates)}
        figures |= {"floor": floor, "tokens a pair": tokens, "padding": padding, "gigabytes": memory}
        figures |= {"seconds to import": imported, "seconds to open": opened}
        figures |= {"systems": tables[0].to_dict("records"), "comparisons": tables[1].to_dict("records")}
        chosen.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    if chosen.plot:
        import matplotlib

        matplotlib.use("Agg")
        axes = tables[0].plot.barh(x="system", y="pairs/s", legend=False, xlabel="pairs a second", ylabel="")
        axes.invert_yaxis()
        axes.figure.savefig(chosen.plot, bbox_inches="tight", dpi=150)


if __name__ == "__main__":
    main()
