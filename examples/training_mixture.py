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
from pathlib import Path


def terms(text: str) -> list[str]:
    """Return lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--take", nargs="+", required=True, metavar="SOURCE=QUERIES")
    parser.add_argument("--negatives", type=int, default=8, help="negatives kept for each query")
    parser.add_argument("--teacher", type=Path, help="scores of another model, in JSON lines")
    parser.add_argument("--held_out", type=Path, help="file with ids of validation queries, one a line")
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args()

    documents: dict[str, dict[str, str]] = {}
    by_source: dict[str, list[dict[str, object]]] = {}
    for folder in arguments.folders:
        with gzip.open(folder / "docs.jsonl.gz", "rt", encoding="utf-8") as lines:
            documents |= {record["docid"]: record for record in map(json.loads, lines)}
        with gzip.open(folder / "train.ids.jsonl.gz", "rt", encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                by_source.setdefault(record["source"], []).append(record)

    taught: dict[str, dict[str, list[float]]] = {}
    if arguments.teacher:
        with gzip.open(arguments.teacher, "rt", encoding="utf-8") as lines:
            taught = {record["query_id"]: record for record in map(json.loads, lines)}

    counts = {docid: Counter(terms(f"{doc['title']} {doc['text']}")) for docid, doc in documents.items()}
    lengths = {docid: count.total() for docid, count in counts.items()}
    mean = sum(lengths.values()) / len(lengths)
    holding = Counter(term for count in counts.values() for term in count)

    def bm25(query: list[str], docid: str) -> float:
        count = counts[docid]
        norm = 0.9 * (0.6 + 0.4 * lengths[docid] / mean)
        return sum(
            math.log(1 + (len(counts) - holding[term] + 0.5) / (holding[term] + 0.5))
            * count[term]
            / (count[term] + norm)
            for term in query
            if term in count
        )

    def hardest(record: dict[str, object]) -> tuple[list[str], dict[str, list[float]]]:
        """Return a query's negatives, and the teacher's scores of its passages."""
        if not taught:
            query = terms(record["query"])
            by_bm25 = sorted(record["negative"], key=lambda docid: (-bm25(query, docid), docid))
            return by_bm25[: arguments.negatives], {}
        scores = taught[record["query_id"]]
        pool = dict(zip(record["negative"], scores["neg_scores"], strict=True))
        pool |= dict(zip(scores["dense"], scores["dense_scores"], strict=True))
        highest = max(scores["pos_scores"])
        below = sorted((d for d in pool if pool[d] <= highest), key=lambda docid: (-pool[docid], docid))
        hard = below[: arguments.negatives * 2 // 3]
        rest = sorted(set(pool) - set(hard))
        negatives = hard + generator.sample(rest, min(arguments.negatives - len(hard), len(rest)))
        return negatives, {
            "pos_scores": scores["pos_scores"],
            "neg_scores": [pool[docid] for docid in negatives],
        }

    held_out = set(arguments.held_out.read_text(encoding="utf-8").split()) if arguments.held_out else set()
    generator = random.Random(arguments.seed)
    drawn = []
    for choice in sorted(arguments.take):
        source, _, queries = choice.partition("=")
        free = [record for record in by_source[source] if record["query_id"] not in held_out]
        drawn += generator.sample(free, min(int(queries), len(free)))
    generator.shuffle(drawn)
    kept_out = [r for source in sorted(by_source) for r in by_source[source] if r["query_id"] in held_out]
    for path, part in ((arguments.output, drawn), (arguments.output.with_suffix(".held_out.jsonl"), kept_out)):
        if not part:
            continue
        unfinished = path.with_name(f"partial.{path.name}")  # a file of its name is whole
        with unfinished.open("w", encoding="utf-8") as output:
            for record in part:
                negatives, scores = hardest(record)
                line = {
                    "query_id": record["query_id"],
                    "query": record["query"],
                    "positive_passages": [documents[docid] for docid in record["positive"]],
                    "negative_passages": [documents[docid] for docid in negatives],
                    **scores,
                }
                output.write(json.dumps(line, ensure_ascii=False) + "\n")
        unfinished.replace(path)
        print(f"{path}: {len(part)} queries")


if __name__ == "__main__":
    main()
