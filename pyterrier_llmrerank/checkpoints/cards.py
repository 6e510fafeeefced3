"""Model cards: they name a saved model's base, data and licence, the way to open it, and the paper to cite."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from . import bundled
from .input_format import TEVATRON_2023, InputFormat
from .locate import is_hub_id, without_revision

if TYPE_CHECKING:
    import torch

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

#: The folder that a card names until its repository is known.
FOLDER = "path/to/this/folder"

#: How to open one depth in other programs.
PAIRS = """\
The tokenizer holds the template: give it the query after `{query}` and the passage after `{passage}`, as a pair of
texts. It puts the other tokens around them.

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{folder}")


def score(pairs):
    return model.predict([("{query}" + query, "{passage}" + passage) for query, passage in pairs])
```

In transformers, `tokenizer("{query}" + query, "{passage}" + passage)` makes the ids. vLLM serves the model with
`vllm serve {folder} --runner pooling --dtype {dtype}`. Send `"{query}..."` as `query` and `"{passage}..."` as
`documents` of its `/rerank`.
"""


def citation(kind: str) -> str:
    """Return the section that cites a reranker's paper."""
    return f"```bibtex\n{CITATIONS[kind]}\n```"


def hub_id_of(base: str | None) -> str | None:
    """Return the hub id of a base, without its revision; None for a folder."""
    name = bundled.BASE if base == bundled.NAME else base
    return without_revision(name)[0] if name and is_hub_id(name) else None


def metadata(base: str | None, library: str, **more: Any) -> ModelCardData:
    """Return the metadata of a reranker; they name its base unless that is a folder."""
    tags, base_model = ["reranker", "pyterrier"], hub_id_of(base)
    return ModelCardData(base_model=base_model, library_name=library, pipeline_tag="text-ranking", tags=tags, **more)


@dataclass(frozen=True)
class Stated:
    """Holds the facts about a model that only the user knows, for its card.

    Args:
        data: names of the training data: hub ids and files. A card gives the last part of a file's path.
        validation: names of the validation data, likewise.
        license: the licence, as the hub abbreviates it.
    """

    data: Sequence[str] = ()
    validation: Sequence[str] = ()
    license: str | None = None

    @property
    def datasets(self) -> list[str] | None:
        """The hub ids among the training data; None if there are none."""
        return [name for name in self.data if is_dataset(name)] or None


def is_dataset(name: str) -> bool:
    """Tell whether the name of data is a hub id, ``owner/name``."""
    return is_hub_id(name) and "/" in name


def _name_list(names: Sequence[str]) -> str:
    """Return the names of data as a list of links and files, without paths of this machine."""
    links = [
        f"[{name}](https://huggingface.co/datasets/{name})" if is_dataset(name) else f"`{PurePath(name).name}`"
        for name in names
    ]
    return ", ".join(links)


def facts(stated: Stated) -> dict[str, str]:
    """Return the sections on data and licence."""
    return {
        "Data": f"Trained on {_name_list(stated.data)}." if stated.data else "Not named.",
        "Licence": stated.license or "Not stated. The licence of the base and the terms of the data may limit use.",
    }


def use_section(name: str, folder: str) -> str:
    """Return the section that says how to open a model.

    Args:
        name: the class that opens it.
        folder: its folder or hub id.
    """
    return (
        "This folder, or a hub repository with its files, opens by its name alone:\n\n"
        f'```python\nfrom pyterrier_llmrerank import {name}\n\n{name}("{folder}")\n```\n\n'
        "`reranker.json` holds its base, adapters and input format."
    )


def adapter_card(
    kind: str, name: str, base: str, steps: int, recipe: str, stated: Stated, measured: str | None, folder: str | None
) -> str:
    """Return the card of a newly trained adapter.

    Args:
        kind: ``rankllama`` or ``matroyshka``.
        name: the class that opens it.
        base: its base: a hub id, the bundled model's name, or a path.
        steps: the steps that it was trained for.
        recipe: the call that makes its recipe.
        stated: the user's facts about it.
        measured: the measure and its value on the validation data; None if there are none.
        folder: the repository that it is for; None if that is not known.
    """
    sections = {
        "": f"Trained by pyterrier_llmrerank for {steps} steps with\n\n```python\n{recipe}\n```",
        "Use": use_section(name, folder or FOLDER),
    }
    if measured is not None:
        where = f"on {_name_list(stated.validation)}" if stated.validation else "on the validation data"
        sections["Validation"] = f"{measured} {where}, after {steps} steps."
    sections |= {**facts(stated), "Citation": citation(kind)}
    data = metadata(base, "peft", datasets=stated.datasets, license=stated.license)
    if measured is not None:
        data.metrics = [measured.partition(" ")[0]]
    shown = hub_id_of(base) or PurePath(base).name
    return compose(data, f"An adapter of {shown}", sections)


def hub_card(card: str | None, kind: str, name: str, base: str | None, repo_id: str, stated: Stated) -> str:
    """Return the card of a model for the hub, with all facts that are known now.

    Args:
        card: the card from its training; None to write a new one.
        kind: ``rankllama`` or ``matroyshka``.
        name: the class that opens it.
        base: the base of its adapters; None for a merged model.
        repo_id: the repository.
        stated: the user's facts about it; a fact that is left out stays as the card has it.
    """
    data = metadata(base, "transformers" if base is None else "peft", datasets=stated.datasets, license=stated.license)
    if card is None:
        kinds = "A merged model" if base is None else f"Adapters of {hub_id_of(base)}"
        sections = {
            "": f"{kinds}, a reranker of pyterrier_llmrerank.",
            "Use": use_section(name, repo_id),
            **facts(stated),
            "Citation": citation(kind),
        }
        return compose(data, repo_id.partition("/")[2], sections)
    written: Any = ModelCard(card, ignore_metadata_errors=False)
    tags = sorted({*(written.data.tags or ()), *(data.tags or ())})
    for key, value in {**vars(data), "tags": tags}.items():
        if value is not None:
            setattr(written.data, key, value)
    if (use := _section("Use").search(written.text)) is None:
        written.text = with_section(written.text, "Use", use_section(name, repo_id))
    else:  # it may name another repository
        call = re.compile(rf'{name}\("[^"\n]*"')
        written.text = written.text.replace(use[0], call.sub(lambda _: f'{name}("{repo_id}"', use[0]))
    for title, given_now in {"Data": stated.data, "Licence": stated.license}.items():
        if given_now:
            written.text = with_section(written.text, title, facts(stated)[title])
    if CITATIONS[kind] not in written.text:
        written.text = with_section(written.text, "Citation", citation(kind))
    return str(written)


def compose(data: ModelCardData, title: str, sections: Mapping[str, str]) -> str:
    """Return a card with metadata, a title and sections; the first, under ``""``, has no heading."""
    parts = [f"## {name}\n\n{text.strip()}" if name else text.strip() for name, text in sections.items()]
    return str(ModelCard("\n".join(["---", data.to_yaml(), "---", f"# {title}\n\n" + "\n\n".join(parts), ""])))


def merged_card(
    base: str, architecture: str, form: InputFormat, columns: tuple[bool, bool], limits: tuple[int, int]
) -> str:
    """Return the card of a RankLLaMA with its adapter merged in.

    Args:
        base: the model below the adapter: a hub id, the bundled model's name, or a path.
        architecture: the class of transformers that opens it.
        form: the format of its input.
        columns: whether it reads titles, and URLs.
        limits: the most tokens that are kept of a query and of a passage.
    """
    title, url = ("{title}" if columns[0] else None), ("{url}" if columns[1] else None)
    query, passage = form.head("{query}"), form.body("{text}", title, url) + form.tail
    if form.name == TEVATRON_2023:
        reads = "It reads two strings, one after the other, each after a first token of its own"
        kept = f"{limits[0]} tokens of the first and {limits[1]} of the second are kept"
        strings = f"{query}\n{passage}"
    else:
        reads = "It reads one string, with the special tokens of its tokenizer"
        reads += ", and the end token" if form.append_eos else ""
        kept = f"query and passage share {sum(limits)} tokens"
        strings = query + passage
    sections = {
        "": f"A RankLLaMA with its adapter merged into a plain `{architecture}` with one label. Written by "
        "pyterrier_llmrerank. Scores are logits.",
        "Use": use_section("RankLLaMAReranker", FOLDER),
        "Input": f"{reads}:\n\n````text\n{strings}\n````\n\nIn pyterrier_llmrerank, {kept}. Other programs that open a "
        f"`{architecture}` give the same scores for the same ids.",
        **facts(Stated()),
        "Citation": citation("rankllama"),
    }
    shown = hub_id_of(base) or PurePath(base).name
    return compose(metadata(base, "transformers"), f"A RankLLaMA on {shown}", sections)


def exported_card(
    base: str | None,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    pieces: tuple[Sequence[int], Sequence[int], Sequence[int]],
    instructions: tuple[str, str],
    limits: tuple[int, int],
) -> str:
    """Return the card of one depth of a Matroyshka that is exported as a plain classifier.

    Args:
        base: the model that it was exported from.
        settings: its configuration: the class of transformers that opens it, and its number of layers.
        dtype: the dtype of its weights.
        pieces: the ids that the tokenizer puts before the query, between query and passage, and after the passage.
        instructions: texts before query and passage.
        limits: the most tokens that are kept of a query and of a passage, including these texts.
    """
    start, between, end = map(list, pieces)
    query, passage = instructions
    (architecture,), depth = settings["architectures"], settings["num_hidden_layers"]
    name = str(dtype).removeprefix("torch.")  # vLLM computes a float32 model in float16 by default
    sections = {
        "": f"The first {depth} layers of a Matroyshka Re-Ranker with the head of that depth, as a plain "
        f"`{architecture}` with one label. Exported by pyterrier_llmrerank. Scores are logits.",
        "Input": PAIRS.format(folder=FOLDER, query=query, passage=passage, dtype=name),
        "Ids": f"The input is `{start}`, the ids of `{query}` and the query, `{between}`, the ids of `{passage}` and "
        f"the passage, and `{end}`. Each text is tokenised by itself, without special tokens. pyterrier_llmrerank "
        f"keeps {limits[0]} tokens of the query and {limits[1]} of the passage; other programs cut long texts "
        "otherwise, so shorten them first.",
        "Licence": "The licence of the model that it was exported from.",
        "Citation": citation("matroyshka"),
    }
    return compose(metadata(base, "transformers"), f"One depth of a Matroyshka: {depth} layers", sections)


def with_section(card: str, name: str, text: str) -> str:
    """Return a card with a section replaced, or added at its end."""
    section, pattern = f"## {name}\n\n{text.strip()}\n", _section(name)
    if pattern.search(card):
        return pattern.sub(lambda found: section + ("\n" if found.end() < len(card) else ""), card, count=1)
    return f"{card.rstrip()}\n\n{section}"


def _section(name: str) -> re.Pattern[str]:
    """Return the pattern of a section, with its heading."""
    return re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
