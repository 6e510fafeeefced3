"""Cards are complete, valid, and say nothing about the machine that wrote them."""

import json
from pathlib import Path

import pytest
from conftest import MODELS
from huggingface_hub import ModelCard

from pyterrier_llmrerank import MatroyshkaReranker
from pyterrier_llmrerank.checkpoints.cards import FOLDER, Stated, adapter_card, hub_card, with_section

STATED = Stated(["owner/data", "/home/someone/train.jsonl"], ["/home/someone/dev.jsonl"])


def a_card(base: str = "owner/base", stated: Stated = STATED) -> str:
    recipe = "RankLLaMATraining(seed=1)"
    return adapter_card("rankllama", "RankLLaMAReranker", base, 7, recipe, stated, "nDCG@10 0.5000", None)


def test_a_trained_card_is_complete() -> None:
    card = ModelCard(a_card(), ignore_metadata_errors=False)
    data = card.data
    assert (data.base_model, data.datasets, data.license) == ("owner/base", ["owner/data"], None)
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("peft", "text-ranking", ["nDCG@10"])
    for said in (
        "# An adapter of owner/base", "for 7 steps", "RankLLaMATraining(seed=1)", f'RankLLaMAReranker("{FOLDER}")',
        "[owner/data](https://huggingface.co/datasets/owner/data), `train.jsonl`.",
        "nDCG@10 0.5000 on `dev.jsonl`, after 7 steps", "## Licence\n\nNot stated", "Xueguang Ma",
    ):  # fmt: skip
        assert said in card.text
    assert "/home" not in card.text


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("owner/base@v1", "owner/base"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/home/someone/base", None),
    ],
)
def test_a_base_is_named_by_its_hub_id(base: str, named: str | None) -> None:
    card = ModelCard(a_card(base), ignore_metadata_errors=False)
    assert card.data.base_model == named
    assert f"# An adapter of {named or 'base'}\n" in card.text
    assert "/home" not in card.content


def test_a_push_completes_the_card_of_the_training() -> None:
    def completed(stated: Stated) -> ModelCard:
        card = hub_card(a_card(), "rankllama", "RankLLaMAReranker", "owner/base", "owner/model", stated)
        return ModelCard(card, ignore_metadata_errors=False)

    card = completed(Stated(["owner/other"], license="mit"))
    assert (card.data.datasets, card.data.license, card.data.metrics) == (["owner/other"], "mit", ["nDCG@10"])
    assert "datasets/owner/other" in card.text
    assert "train.jsonl" not in card.text
    assert "## Licence\n\nmit\n\n## Citation" in card.text
    assert 'RankLLaMAReranker("owner/model")' in card.text
    assert card.text.count("@article") == 1
    kept = completed(Stated())  # what is left out stays as the training said
    assert kept.data.datasets == ["owner/data"]
    assert "`train.jsonl`" in kept.text


def test_a_card_pushed_again_opens_its_new_repository() -> None:
    card: str | None = a_card()
    for repo_id in ("me/first", "me/second"):
        card = hub_card(card, "rankllama", "RankLLaMAReranker", "owner/base", repo_id, Stated())
    assert card is not None
    assert 'RankLLaMAReranker("me/second")' in card
    assert "me/first" not in card
    assert FOLDER not in card
    assert card.count("## Use") == 1
    card = card.replace("## Use\n", "## Use\n\nCall it with at most 100 candidates.\n")
    again = hub_card(card, "rankllama", "RankLLaMAReranker", "owner/base", "me/third", Stated())
    assert again == card.replace("me/second", "me/third")


def test_a_section_is_replaced_or_added() -> None:
    card = "# A\n\n## Data\n\nold\n\n## Licence\n\nx\n"
    assert with_section(card, "Data", "new") == "# A\n\n## Data\n\nnew\n\n## Licence\n\nx\n"
    assert with_section(card, "Licence", "y") == "# A\n\n## Data\n\nold\n\n## Licence\n\ny\n"
    assert with_section(card, "Citation", "z") == card + "\n## Citation\n\nz\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_card_of_an_exported_depth_serves_it_in_its_own_dtype(dtype: str, tmp_path: Path) -> None:
    """Without ``--dtype``, vLLM computes a float32 model in float16."""
    reranker = MatroyshkaReranker(MODELS / "costwise_full", dtype=dtype)
    reranker.save(tmp_path / "served", merged=True, cutoff=3, form="sequence-classification")
    assert json.loads((tmp_path / "served" / "config.json").read_text())["dtype"] == dtype
    card = ModelCard.load(tmp_path / "served" / "README.md", ignore_metadata_errors=False)
    assert f"vllm serve {FOLDER} --runner pooling --dtype {dtype}`" in card.text
    assert "# One depth of a Matroyshka: 3 layers\n" in card.text
