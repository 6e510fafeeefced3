"""Model cards: what a saved model is, how to open it, and whom to cite."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from . import bundled
from .locate import is_hub_id, without_revision

#: The papers of the two rerankers.
CITATIONS = {
    "rankllama": """\
@article{rankllama,
  title   = {Fine-Tuning {LLaMA} for Multi-Stage Text Retrieval},
  author  = {Xueguang Ma and Liang Wang and Nan Yang and Furu Wei and Jimmy Lin},
  year    = {2023},
  journal = {arXiv:2310.08319},
  url     = {https://arxiv.org/abs/2310.08319}
}""",
    "matroyshka": """\
@inproceedings{matroyshka,
  title     = {Fitting Into Any Shape: A Flexible {LLM}-Based Re-Ranker With Configurable Depth and Width},
  author    = {Zheng Liu and Chaofan Li and Shitao Xiao and Chaozhuo Li and Chen Jason Zhang and Hao Liao and
               Defu Lian and Yingxia Shao},
  booktitle = {Proceedings of the ACM on Web Conference 2025},
  pages     = {3942--3951},
  year      = {2025},
  doi       = {10.1145/3696410.3714620}
}""",
}

#: A folder in a card, until its repository is known.
FOLDER = "path/to/this/folder"

#: Open one depth in other programs.
PAIRS = """\
The tokenizer holds the template: give it the query after `{query}` and the passage after `{passage}`, as a pair of
texts. It puts the other tokens around them.

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{folder}")


def score(pairs):
    return model.predict([("{query}" + query, "{passage}" + passage) for query, passage in pairs])
```

In transformers, `tokenizer("{query}" + query, "{passage}" + passage)` makes the ids. Send vLLM `"{query}..."` as
`text_1` and `"{passage}..."` as `text_2` of `/score`, and Text Embeddings Inference the same as `query` and `texts` of
`/rerank`.
"""


def citation(kind: str) -> str:
    """Return the section that cites a reranker's paper."""
    return f"```bibtex\n{CITATIONS[kind]}\n```"


def on_hub(base: str | None) -> str | None:
    """Return the hub id of a base, without its revision; None for a folder."""
    name = bundled.BASE if base == bundled.NAME else base
    return without_revision(name)[0] if name and is_hub_id(name) else None


def metadata(base: str | None, library: str, **more: Any) -> ModelCardData:
    """Return the metadata of a reranker on a base, which may be a folder: that is left out."""
    tags = ["reranker", "pyterrier"]
    return ModelCardData(base_model=on_hub(base), library_name=library, pipeline_tag="text-ranking", tags=tags, **more)


def compose(data: ModelCardData, title: str, sections: Mapping[str, str]) -> str:
    """Return a card with metadata, a title and sections; the first, under ``""``, has no heading."""
    parts = [f"## {name}\n\n{text.strip()}" if name else text.strip() for name, text in sections.items()]
    return str(ModelCard("\n".join(["---", data.to_yaml(), "---", f"# {title}\n\n" + "\n\n".join(parts), ""])))


def exported(
    base: str | None,
    architecture: str,
    depth: int,
    pieces: tuple[Sequence[int], Sequence[int], Sequence[int]],
    instructions: tuple[str, str],
    limits: tuple[int, int],
) -> str:
    """Return the card of one depth of a Matroyshka that is exported as a plain classifier.

    Args:
        base: the model that it was exported from.
        architecture: the class of transformers that opens it.
        depth: its number of layers.
        pieces: ids before the query, between query and passage, and after the passage, which the tokenizer puts there.
        instructions: texts before query and passage.
        limits: most tokens of query and of passage, with these texts.
    """
    start, between, end = map(list, pieces)
    query, passage = instructions
    sections = {
        "": f"The first {depth} layers of a Matroyshka Re-Ranker with the head of that depth, as a plain "
        f"`{architecture}` with one label. Exported by pyterrier_llmrerank. Scores are logits.",
        "Input": PAIRS.format(folder=FOLDER, query=query, passage=passage),
        "Ids": f"The input is `{start}`, the ids of `{query}` and the query, `{between}`, the ids of `{passage}` and "
        f"the passage, and `{end}`. Each text is tokenised by itself, without special tokens. pyterrier_llmrerank "
        f"keeps {limits[0]} tokens of the query and {limits[1]} of the passage; other programs cut long texts "
        "otherwise, so shorten them first.",
        "Licence": "As the model that it was exported from.",
        "Citation": citation("matroyshka"),
    }
    return compose(metadata(base, "transformers"), f"One depth of a Matroyshka: {depth} layers", sections)


def with_section(card: str, name: str, text: str) -> str:
    """Return a card with a section replaced, or added at its end."""
    section = f"## {name}\n\n{text.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(card):
        return pattern.sub(lambda found: section + ("\n" if found.end() < len(card) else ""), card, count=1)
    return f"{card.rstrip()}\n\n{section}"
