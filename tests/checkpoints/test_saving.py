"""What is written is written whole, or not at all."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, MODELS, frame, no_file_above, words
from huggingface_hub import ModelCard
from test_tokenizer import NAMED, QWEN, byte_level, folder_of, sentencepiece
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints import saving, tokenizer
from pyterrier_llmrerank.checkpoints.input_format import InputFormat
from pyterrier_llmrerank.checkpoints.saving import all_or_nothing

#: By how much two programs' scores differ in fp32 on tiny random models, which amplify the order of sums.
ROUNDING = 3e-5 if DEVICE.type == "cpu" else 1e-4

PAIR = ("a query", "a passage")
RANKLLAMA = RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32")
MATROYSHKA = MatroyshkaReranker(
    MODELS / "mistral_base",
    adapters=[MODELS / "adapter_sd", MODELS / "adapter_comp_layer"],
    start_layer=2,
    dtype="float32",
)
SAVED = pytest.mark.parametrize(
    ("reranker", "merged"),
    [(RANKLLAMA, False), (RANKLLAMA, True), (MATROYSHKA, False), (MATROYSHKA, True)],
    ids=["adapter", "merged", "adapters", "merged heads"],
)


@SAVED
def test_a_full_disk_leaves_nothing_that_opens(reranker: Any, merged: bool, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    largest = max(file.stat().st_size for file in (MODELS / "adapter_sd").iterdir())
    for room in (1_000, 10_000, 40_000, largest - 1):  # where one file or another no longer fits
        for folder in (tmp_path / "new", tmp_path / "empty"):
            with no_file_above(room), pytest.raises(OSError, match=r"too large|cannot be written"):
                reranker.save(folder, merged=merged)
        assert not (tmp_path / "new").exists()
        assert list((tmp_path / "empty").iterdir()) == []
    reranker.save(tmp_path / "empty", merged=merged)  # and then there is room


@pytest.mark.parametrize("reranker", [RANKLLAMA, MATROYSHKA], ids=["rankllama", "matroyshka"])
def test_the_file_that_makes_it_a_model_is_written_last(
    reranker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process cannot tidy up, but must leave no folder that opens."""
    order: list[str] = []
    write_text = Path.write_text

    def noted(path: Path, *args: Any, **options: Any) -> int:
        order.append(path.name)
        assert {file.name for file in path.parent.iterdir()} >= {"tokenizer.json", "model.safetensors"}
        return write_text(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", noted)
    reranker.save(tmp_path / "merged", merged=True)
    assert order[-2:] == ["reranker.json", "config.json"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="exists and is not empty"), all_or_nothing(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "kept"


def test_an_interruption_tidies_up_too(tmp_path: Path) -> None:
    def interrupted() -> None:
        with all_or_nothing(tmp_path / "new") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text("half")
            (folder / "link").symlink_to(MODELS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "new").exists()
    assert MODELS.is_dir()


def test_an_adapters_run_is_not_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    RANKLLAMA.save(source)
    for name in ("trainer_state.json", "optimizer.pt"):
        (source / name).write_text("{}")
    (tmp_path / "target").mkdir()
    saving.copy_adapter(source, tmp_path / "target", base="another/base")
    copied = {file.name for file in (tmp_path / "target").iterdir()}
    assert copied == {file.name for file in source.iterdir()} - {"trainer_state.json", "optimizer.pt", "reranker.json"}
    assert '"another/base"' in (tmp_path / "target" / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"url_field": "url", "title_field": None, "query_prefix": "ask: "},
        {"input_format": "tevatron-2024", "append_eos": True},
        {"input_format": "Q: {query}\nT: {title}\nD: {text}</s>", "passage_max_length": 400},
    ],
    ids=str,
)
def test_the_card_of_a_merged_rankllama_says_how_its_input_is_made(given: dict[str, Any], tmp_path: Path) -> None:
    """Transformers give our scores for ids that are made as it says."""
    ours = RankLLaMAReranker(
        MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32", **given
    )
    folder = tmp_path / "merged"
    ours.save(folder, merged=True)
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert (card.data.library_name, card.data.base_model) == ("transformers", None)  # the base is a folder
    assert "/rankllama_base" not in card.content
    for said in ("# A RankLLaMA on rankllama_base", "`LlamaForSequenceClassification`", "@article{rankllama"):
        assert said in card.text
    (strings,) = re.findall(r"````text\n(.*?)\n````", card.text, re.DOTALL)
    rows = frame(1, 2).assign(title="A title", url="u.org")
    made, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    wanted = []
    for row in rows.to_dict("records"):
        text = strings.format(**row)
        parts = text.split("\n") if "two strings" in card.text else [text]
        ids = [token for part in parts for token in made(part)["input_ids"]]
        ids += [made.eos_token_id] * ("and the end token" in card.text)
        with torch.inference_mode():
            wanted.append(model.eval()(input_ids=torch.tensor([ids])).logits.item())
    np.testing.assert_allclose(ours.transform(rows)["score"], wanted, atol=1e-4)
    columns = {name: given[name] for name in ("title_field", "url_field") if name in given}
    opened = RankLLaMAReranker(folder, dtype="float32", **columns)
    np.testing.assert_allclose(opened.transform(rows)["score"], wanted, atol=1e-4)


ODD = ["what?", "\n a ", "a \n", "  two", "", "x<|im_end|>y</s>", "大熊猫?", "naïve\n\n", words(4, 30)]


def score_of(folder: Path) -> Any:
    """Return the function in the card of an exported model."""
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    told: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), told)  # ours
    return told["score"]


@pytest.mark.parametrize("heads", ["layer-wise", "yes"])
def test_every_depth_is_a_plain_classifier(heads: str, tmp_path: Path) -> None:
    """Transformers and sentence-transformers give our scores with the ids that the card makes, in batches too."""
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    reranker = MATROYSHKA if heads == "yes" else MatroyshkaReranker(MODELS / "costwise_full", dtype="float32")
    pairs = [("panda", words(3, 9)), ("tide", words(4, 30))]
    layers = reranker.scorer().checkpoint.head_layers
    for layer in layers:
        ours, folder = reranker.at(cutoff=layer), tmp_path / f"{layer}"
        reranker.save(folder, merged=True, cutoff=layer, form="sequence-classification")
        opened, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32
        )
        assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (opened.config.num_hidden_layers, opened.config.num_labels) == (layer, 1)
        made = AutoTokenizer.from_pretrained(folder)
        texts = [("A: " + query, "B: " + passage) for query, passage in pairs]
        batch = made(*zip(*texts, strict=True), padding=True, return_tensors="pt")
        with torch.inference_mode():
            together = opened(**batch).logits[:, 0]
        score = score_of(folder)
        wanted = ours.compute_score(pairs)
        for theirs in (together, score(pairs), [score([pair])[0] for pair in pairs]):
            np.testing.assert_allclose(theirs, wanted, atol=ROUNDING)
    odd = [(query, passage) for query in ODD for passage in ODD]
    found = [made("A: " + query, "B: " + passage)["input_ids"] for query, passage in odd]
    assert found == [ids.flat() for ids in ours.scorer().ids(odd)]
    np.testing.assert_allclose(score(odd), ours.compute_score(odd), atol=ROUNDING)


def test_a_tokenizer_with_other_ids_elsewhere_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = {"merged": True, "cutoff": 4, "form": "sequence-classification"}
    folder = folder_of(tmp_path / "slow", MODELS / "costwise_full", NAMED, tokenizer__model=sentencepiece())
    with pytest.raises(ValueError, match=r"slow': other programs get other ids from its tokenizer.model"):
        MatroyshkaReranker(folder, dtype="float32").save(tmp_path / "new", **export)
    monkeypatch.setattr(tokenizer, "set_pair", lambda *args: None)  # as if a class made its own template
    with pytest.raises(ValueError, match=r"for \('A: what is tea.* gives the ids \[1, .*, but in transformers \[1, "):
        MATROYSHKA.save(tmp_path / "new", **export)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "Qwen2Tokenizer", None])
def test_byte_level_tokenizers_are_exported(named: str | None, tmp_path: Path) -> None:
    made = byte_level(regex=QWEN)
    settings = {"tokenizer_class": named, "bos_token": None, "eos_token": "<|endoftext|>"}
    files = {"tokenizer__json": made.to_str().encode()}
    if named is not None:
        made.model.save(str(tmp_path))
        files = {f"{name}__{end}": (tmp_path / f"{name}.{end}").read_bytes() for name, end in
                 (("vocab", "json"), ("merges", "txt"))}  # fmt: skip
    folder = folder_of(tmp_path / "m", MODELS / "costwise_full", settings, **files)
    ours = MatroyshkaReranker(folder, dtype="float32", cutoff=4)
    ours.save(tmp_path / "new", merged=True, form="sequence-classification")
    odd = [(query, passage) for query in ODD for passage in ODD]
    np.testing.assert_allclose(score_of(tmp_path / "new")(odd), ours.compute_score(odd), atol=ROUNDING)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"merged": True, "cutoff": 1, "form": "sequence-classification"}, "cutoff=1: .* has heads at layers 2 to 8"),
        ({"form": "sequence-classification"}, "form='sequence-classification' writes a merged model; give merged=True"),
        ({"cutoff": 4}, "cutoff=4: adapters and layer-wise models keep all depths"),
        ({"merged": True, "form": "onnx"}, "form='onnx'; allowed: sequence-classification"),
    ],
)
def test_exports_that_make_no_sense_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        MATROYSHKA.save(tmp_path / "new", **given)
    assert not (tmp_path / "new").exists()


def test_an_export_of_several_depths_needs_one_cutoff(tmp_path: Path) -> None:
    several, form = MATROYSHKA.at(cutoff=[3, 5]), "sequence-classification"
    with pytest.raises(ValueError, match=r"writes one depth, but the cutoffs are \(3, 5\); give one as cutoff"):
        several.save(tmp_path / "new", merged=True, form=form)
    assert not (tmp_path / "new").exists()
    several.save(tmp_path / "new", merged=True, form=form, cutoff=3)
    np.testing.assert_allclose(score_of(tmp_path / "new")([PAIR])[0], MATROYSHKA.at(cutoff=3).compute_score(PAIR), 1e-4)
    MATROYSHKA.at(cutoff=[4]).save(tmp_path / "one", merged=True, form=form)


@pytest.mark.parametrize("kind", [RankLLaMAReranker, MatroyshkaReranker])
def test_an_exported_depth_is_refused_here(kind: Any, tmp_path: Path) -> None:
    """RankLLaMA would read another input than it was trained with, and Matroyshka has no heads."""
    MATROYSHKA.save(tmp_path / "new", merged=True, cutoff=4, form="sequence-classification")
    with pytest.raises(ValueError, match=r"reranker.json describes one depth of a Matroyshka, exported as a plain"):
        kind(tmp_path / "new").compute_score(PAIR)
    from pyterrier_llmrerank.training import DistillTraining, RankLLaMATraining

    recipe = RankLLaMATraining() if kind is RankLLaMAReranker else DistillTraining()
    with pytest.raises(ValueError, match=r"describes one depth of a Matroyshka"):
        recipe.open(str(tmp_path / "new"), [])


@pytest.mark.parametrize("end", ["</s>", "<s>", "<unk>"])
def test_the_token_in_which_every_input_ends_does_not_pad(end: str, tmp_path: Path) -> None:
    """Transformers reads the last token that does not pad, in batches too."""
    base, adapter = (
        shutil.copytree(MODELS / name, tmp_path / name) for name in ("rankllama_base", "rankllama_adapter")
    )
    made = AutoTokenizer.from_pretrained(base)
    made.pad_token = end
    for folder in (base, adapter):
        made.save_pretrained(folder)
    form = f"Q: {{query}} D: {{text}}{end}"
    ours = RankLLaMAReranker(adapter, base_model=base, dtype="float32", input_format=form)
    ours.save(tmp_path / "merged", merged=True)
    pairs = [("panda", words(3, 9)), ("tide", words(4, 30))]
    ids = ours.scorer().ids([(query, InputFormat(form).body(passage)) for query, passage in pairs])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    pad = AutoTokenizer.from_pretrained(tmp_path / "merged").pad
    with torch.inference_mode():
        together = model(**pad({"input_ids": [pair.flat() for pair in ids]}, return_tensors="pt")).logits[:, 0]
    np.testing.assert_allclose(together, ours.compute_score(pairs), atol=ROUNDING)
    layered = shutil.copytree(MODELS / "costwise_full", tmp_path / "layered")
    made.save_pretrained(layered)
    deep = MatroyshkaReranker(layered, dtype="float32", cutoff=4, prompt=f"Is it?{end}")
    deep.save(tmp_path / "export", merged=True, form="sequence-classification")
    np.testing.assert_allclose(score_of(tmp_path / "export")(pairs), deep.compute_score(pairs), atol=ROUNDING)


@pytest.mark.parametrize("first", ["<s>", ""])
def test_other_programs_make_the_ids_of_a_merged_rankllama(first: str, tmp_path: Path) -> None:
    """From the strings that the page on serving names, with the first token from the tokenizer or from the caller."""
    base = shutil.copytree(MODELS / "rankllama_base", tmp_path / "base")
    made = AutoTokenizer.from_pretrained(base)
    own = "" if first else "<s> "
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{own}$A", pair=f"{own}$A {own}$B", special_tokens=[("<s>", made.bos_token_id)]
    )
    made.save_pretrained(base)
    for form in ("tevatron-2023", "tevatron-2024"):
        ours = RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=base, dtype="float32", input_format=form)
        ours.save(tmp_path / form, merged=True)
        opened = AutoTokenizer.from_pretrained(tmp_path / form)
        for title, passage in ((None, "Bamboo."), ("", " Bamboo."), ("Pandas", "Pandas Bamboo.")):
            if form == "tevatron-2023":
                ids = opened(f"{first}query: panda", f"{first}document: {passage}")["input_ids"]
            else:
                ids = opened(f"query:  panda document:  {title or ''} Bamboo.")["input_ids"]
            body = InputFormat(form).body("Bamboo.", title)
            assert ids == ours.scorer().ids([("panda", body)])[0].flat()


@pytest.mark.parametrize("eos", ["</s>", None])
def test_a_tokenizer_without_another_token_to_pad_with_is_refused(eos: str | None, tmp_path: Path) -> None:
    made = byte_level(regex=QWEN)
    made.add_special_tokens(["</s>"])
    settings = {"bos_token": None, "eos_token": eos, "pad_token": eos, "unk_token": None}
    folder = folder_of(tmp_path / "m", MODELS / "costwise_full", settings, tokenizer__json=made.to_str().encode())
    ours = MatroyshkaReranker(folder, dtype="float32", cutoff=4, prompt="Is it?</s>")
    why = r" but '</s>', in which every input ends" if eos else ""
    with pytest.raises(
        ValueError, match=f"model='.*m': its tokenizer has no pad, unknown, end or first token{why}, to"
    ):
        ours.save(tmp_path / "new", merged=True, form="sequence-classification")


def test_an_export_has_no_chat_template(tmp_path: Path) -> None:
    """With one, sentence-transformers would read a pair as messages of a chat."""
    base = shutil.copytree(MODELS / "costwise_full", tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    reranker = MatroyshkaReranker(base, dtype="float32")
    assert reranker.tokenizer.chat_template == "{{ messages }}"
    reranker.save(tmp_path / "export", merged=True, form="sequence-classification")
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template is None
