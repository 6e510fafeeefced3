"""Make one training file from several sources, with a number of queries from each and their hardest negatives.

    python examples/training_mixture.py train.jsonl FOLDER [FOLDER ...] --take msmarco=7000 insuranceqa=3600

Each FOLDER holds docs.jsonl.gz (docid, title, text) and train.ids.jsonl.gz (query_id, source, query, positive
and negative: lists of docid). A query keeps the negatives with the highest BM25 scores over these passages. Queries
whose ids are in --held_out go to a second file for validation, and never to the first.

--teacher names a file of another model's scores (query_id, pos_scores, neg_scores, dense: more candidates,
dense_scores). Two thirds of a query's negatives are then the highest in these scores, among those not above the
positive. The others are drawn from the rest. The training file contains the scores too, for distillation.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def terms(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def bm25(documents: dict[str, Record]) -> Callable[[list[str], str], float]:
    """Return the function that scores a docid for the terms of a query."""
    counts = {docid: Counter(terms(f"{doc['title']} {doc['text']}")) for docid, doc in documents.items()}
    mean = sum(count.total() for count in counts.values()) / len(counts)
    holding = Counter(term for count in counts.values() for term in count)

    def score(query: list[str], docid: str) -> float:
        count = counts[docid]
        norm = 0.9 * (0.6 + 0.4 * count.total() / mean)
        found = [term for term in query if term in count]
        weights = [math.log(1 + (len(counts) - holding[term] + 0.5) / (holding[term] + 0.5)) for term in found]
        return sum(w * count[term] / (count[term] + norm) for w, term in zip(weights, found, strict=True))

    return score


def by_teacher(record: Record, scores: Record, size: int, generator: random.Random) -> tuple[list[str], Record]:
    """Return a query's negatives, and the teacher's scores of its passages."""
    pool = dict(zip(record["negative"], scores["neg_scores"], strict=True))
    pool |= dict(zip(scores["dense"], scores["dense_scores"], strict=True))
    below = [docid for docid in pool if pool[docid] <= max(scores["pos_scores"])]
    hard = sorted(below, key=lambda docid: (-pool[docid], docid))[: size * 2 // 3]
    rest = sorted(set(pool) - set(hard))
    negatives = hard + generator.sample(rest, min(size - len(hard), len(rest)))
    return negatives, {"pos_scores": scores["pos_scores"], "neg_scores": [pool[docid] for docid in negatives]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--take", nargs="+", required=True, metavar="SOURCE=QUERIES")
    parser.add_argument("--negatives", type=int, default=8, help="negatives kept for each query")
    parser.add_argument("--teacher", type=Path, help="scores of another model, in JSON lines")
    parser.add_argument("--held_out", type=Path, help="file with ids of validation queries, one a line")
    parser.add_argument("--seed", type=int, default=17)
    chosen = parser.parse_args()

    documents = {doc["docid"]: doc for folder in chosen.folders for doc in read(folder / "docs.jsonl.gz")}
    records = [record for folder in chosen.folders for record in read(folder / "train.ids.jsonl.gz")]
    taught = {record["query_id"]: record for record in (read(chosen.teacher) if chosen.teacher else [])}
    held_out = set(chosen.held_out.read_text(encoding="utf-8").split()) if chosen.held_out else set()
    score, generator = bm25(documents), random.Random(chosen.seed)

    def line(record: Record) -> str:
        if taught:
            negatives, scores = by_teacher(record, taught[record["query_id"]], chosen.negatives, generator)
        else:
            query = terms(record["query"])
            ranked = sorted(record["negative"], key=lambda docid: (-score(query, docid), docid))
            negatives, scores = ranked[: chosen.negatives], {}
        kept = {"query_id": record["query_id"], "query": record["query"]}
        passages = {"positive_passages": record["positive"], "negative_passages": negatives}
        kept |= {key: [documents[docid] for docid in docids] for key, docids in passages.items()}
        return json.dumps(kept | scores, ensure_ascii=False) + "\n"

    drawn = []
    for source, _, queries in (choice.partition("=") for choice in sorted(chosen.take)):
        free = [r for r in records if r["source"] == source and r["query_id"] not in held_out]
        if not free:
            parser.error(f"--take {source}: no such source in the folders, or all its queries are held out")
        drawn += generator.sample(free, min(int(queries), len(free)))
    generator.shuffle(drawn)
    kept_out = sorted((r for r in records if r["query_id"] in held_out), key=lambda record: record["source"])
    for path, part in ((chosen.output, drawn), (chosen.output.with_suffix(".held_out.jsonl"), kept_out)):
        if part:
            unfinished = path.with_name(f"partial.{path.name}")  # a file of its name is whole
            unfinished.write_text("".join(map(line, part)), encoding="utf-8")
            unfinished.replace(path)
            print(f"{path}: {len(part)} queries")


if __name__ == "__main__":
    main()
