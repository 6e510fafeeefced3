"""A saved reranker opens by its folder alone, and a description that cannot be trusted is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS, RECORDS, Cache, frame, ids_of, words, written

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints import description
from pyterrier_llmrerank.checkpoints.json_files import read_json
from pyterrier_llmrerank.training import CompensateTraining, DistillTraining, RankLLaMATraining
from pyterrier_llmrerank.training.commands import main

BASE = str(MODELS / "mistral_base")
PAIRS = [("panda food", "a panda eats bamboo"), ("panda food", "coffee beans")]
POOLED = {"compress_layers": 1, "compress_ratio": 2}
ADAPTERS = [str(MODELS / "adapter_sd"), str(MODELS / "adapter_comp_layer")]
TOKEN = {2: str(MODELS / "adapter_comp_token2")}


def reranker(**arguments: Any) -> MatroyshkaReranker:
    given = {"adapters": ADAPTERS, "token_adapters": TOKEN, "start_layer": 2, "prompt": "Is it?", "dtype": "float32"}
    return MatroyshkaReranker(BASE, **{**given, **arguments})


def same(opened: Any, wanted: Any) -> None:
    np.testing.assert_array_equal(opened.compute_score(PAIRS), wanted.compute_score(PAIRS))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    reranker().save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("shape", [{}, POOLED, {**POOLED, "compress_ratio": 4}, {"cutoff": 2}])
def test_a_saved_matroyshka_opens_by_its_folder(saved: Path, shape: dict[str, Any]) -> None:
    same(MatroyshkaReranker(saved, dtype="float32", **shape), reranker(**shape))
    same(MatroyshkaReranker(saved, dtype="float32").at(**shape), reranker(**shape))


def test_the_file_holds_all_that_opening_needs(saved: Path) -> None:
    content = read_json(saved / "reranker.json")
    assert content.pop("package_version")
    assert content == {
        "format_version": 1, "kind": "matroyshka", "base": BASE, "layers": None, "start_layer": 2, "layer_sep": None,
        "prompt": "Is it?", "adapters": ["1", "2"], "token_adapters": {"2": "token-2"},
    }  # fmt: skip


def test_the_file_is_read_again_only_after_a_change(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    monkeypatch.setattr(description, "read_json", lambda path: reads.append(path) or read_json(path))
    opened = MatroyshkaReranker(saved, dtype="float32")
    opened.compute_score(PAIRS)
    reads.clear()
    opened.compute_score(PAIRS)
    assert reads == []
    content = read_json(saved / "reranker.json")
    (saved / "reranker.json").write_text(json.dumps(content | {"prompt": "Is it relevant?"}))
    same(opened, reranker(prompt="Is it relevant?"))


def test_its_adapters_open_without_the_file(tmp_path: Path) -> None:
    for shape in ({}, POOLED):
        folders = reranker(**shape).save(tmp_path / str(len(shape)))
        opened = reranker(adapters=[str(folder) for folder in folders], token_adapters={}, **shape)
        np.testing.assert_allclose(opened.compute_score(PAIRS), reranker(**shape).compute_score(PAIRS), atol=1e-4)


def test_a_single_adapter_is_in_the_folder_itself(tmp_path: Path) -> None:
    assert reranker(adapters=ADAPTERS[0]).save(tmp_path / "one") == [tmp_path / "one"]
    opened = MatroyshkaReranker(tmp_path / "one", dtype="float32", **POOLED)
    same(opened, reranker(adapters=ADAPTERS[0], **POOLED))
    assert repr(opened).endswith(", compress_layers=(1,), compress_ratio=2, dtype='float32') over one, token-2")
    assert opened.save(tmp_path / "again") == [tmp_path / "again", tmp_path / "again" / "token-2"]
    same(MatroyshkaReranker(tmp_path / "again", dtype="float32", **POOLED), opened)


def test_a_merged_matroyshka_keeps_its_prompt(tmp_path: Path) -> None:
    reranker(token_adapters={}).save(tmp_path / "merged", merged=True)
    opened = MatroyshkaReranker(tmp_path / "merged", dtype="float32")
    np.testing.assert_allclose(opened.compute_score(PAIRS), reranker().compute_score(PAIRS), atol=1e-5)
    assert repr(opened) == f"MatroyshkaReranker({str(tmp_path / 'merged')!r}, dtype='float32')"


@pytest.mark.parametrize("merged", [False, True])
def test_a_saved_rankllama_opens_by_its_folder(tmp_path: Path, merged: bool) -> None:
    wanted = RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32")
    wanted.save(tmp_path / "saved", merged=merged)
    opened = RankLLaMAReranker(tmp_path / "saved", dtype="float32")
    np.testing.assert_allclose(opened.compute_score(PAIRS), wanted.compute_score(PAIRS), atol=1e-5)
    with pytest.raises(ValueError, match=r"describes a rankllama model; open it with RankLLaMAReranker"):
        MatroyshkaReranker(tmp_path / "saved")


#: Longer than the usual lengths, and than those of the rerankers below.
LONG = [(words(1, 60), words(2, 900)), (words(3, 4), words(4, 300)), (words(5, 50), "short")]


def rankllama(**arguments: Any) -> RankLLaMAReranker:
    return RankLLaMAReranker(
        MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32", **arguments
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("make", "lengths"),
    [
        (rankllama, {"query_max_length": 40, "passage_max_length": 400}),
        (rankllama, {"passage_max_length": 90, "input_format": "tevatron-2024"}),
        (reranker, {"max_length": 700}),
        (reranker, {"query_max_length": 20, "max_length": 90}),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_a_saved_reranker_keeps_its_lengths(make: Any, lengths: dict[str, Any], merged: bool, tmp_path: Path) -> None:
    ours = make(**lengths)
    ours.save(tmp_path / "saved", merged=merged)
    opened = type(ours)(tmp_path / "saved", dtype="float32")
    assert ids_of(opened, LONG) == ids_of(ours, LONG) != ids_of(make(), LONG)
    opened.save(tmp_path / "again", merged=merged or type(ours) is MatroyshkaReranker)
    assert ids_of(type(ours)(tmp_path / "again", dtype="float32"), LONG) == ids_of(ours, LONG)
    usual = {"query_max_length": 32, "passage_max_length": 164} if make is rankllama else {"max_length": 512}
    if make is reranker:
        usual["query_max_length"] = 384
    explicit = type(ours)(tmp_path / "saved", dtype="float32", **usual)  # wins
    wanted = make(**{name: value for name, value in lengths.items() if name == "input_format"})
    assert ids_of(explicit, LONG) == ids_of(wanted, LONG)


def test_a_hub_models_lengths_are_its_own(cached: Cache, tmp_path: Path) -> None:
    for number, ours in enumerate((rankllama(passage_max_length=90), reranker(max_length=90, token_adapters={}))):
        ours.save(tmp_path / str(number), merged=True)
        cached.add(f"owner/model{number}", tmp_path / str(number), "a" * 40, "main")
        opened = type(ours)(f"owner/model{number}", dtype="float32")
        assert ids_of(opened, LONG) == ids_of(ours, LONG)


@pytest.mark.parametrize("merged", [False, True])
def test_columns_are_the_users_and_not_the_models(merged: bool, tmp_path: Path) -> None:
    rows = frame(2, 3).assign(title="A title", url="u.org", headline="Other")
    rankllama(url_field="url", title_field=None).save(tmp_path / "saved", merged=merged)
    for given in ({}, {"title_field": "title"}, {"title_field": None}, {"url_field": None}, {"url_field": "url"}):
        opened = RankLLaMAReranker(tmp_path / "saved", dtype="float32", **given)
        wanted = rankllama(**given).transform(rows)
        np.testing.assert_allclose(opened.transform(rows)["score"], wanted["score"], atol=1e-5)


def test_the_usual_lengths_are_not_written(tmp_path: Path) -> None:
    """Earlier releases open the folder."""
    rankllama().save(tmp_path / "saved")
    assert set(read_json(tmp_path / "saved" / "reranker.json")) & set(description.LENGTHS) == set()


def test_arguments_win_over_the_file(saved: Path) -> None:
    same(MatroyshkaReranker(saved, prompt="Why?", dtype="float32"), reranker(prompt="Why?"))
    one = MatroyshkaReranker(saved, adapters="1", dtype="float32", **POOLED)  # a folder below the model's own
    same(one, reranker(adapters=ADAPTERS[0], token_adapters={}, **POOLED))
    other = MatroyshkaReranker(saved, token_adapters={4: str(saved / "token-2")}, dtype="float32", **POOLED)
    same(other, reranker(token_adapters={}, **POOLED))  # none fits


def test_a_saved_reranker_is_no_adapter(saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapters: .*saved has no adapter_config.json; it is a saved rer"):
        reranker(adapters=str(saved))


def change(folder: Path, **fields: Any) -> None:
    path = folder / "reranker.json"
    path.write_text(json.dumps(read_json(path) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 2}, r"has format_version 2; this release .* reads up to 1"),
        ({"format_version": None}, r"has format_version None"),
        ({"format_version": True}, r"format_version in .* is True"),
        ({"run": "setup.py"}, r"has an unknown field 'run'"),
        ({"kind": "other"}, r"kind in .* is 'other'; allowed: rankllama, matroyshka"),
        ({"kind": "rankllama"}, r"describes a rankllama model; open it with RankLLaMAReranker"),
        ({"base": "../base"}, r"base in .* is '../base'; allowed: a hub id, an absolute path or null"),
        ({"base": 3}, r"base in .* is 3; allowed: a string"),
        ({"start_layer": 0}, r"start_layer in .* is 0; allowed: an integer of at least 1"),
        ({"start_layer": "2"}, r"start_layer in .* is '2'"),
        ({"prompt": ["Is it?"]}, r"prompt in .* allowed: a string"),
        ({"adapters": ["1", "../1"]}, r"adapters in .* is \['1', '../1'\]; allowed: names of folders below its own"),
        ({"adapters": ["/etc"]}, r"adapters in .* is \['/etc'\]"),
        ({"adapters": ["1/../../x"]}, r"adapters in .* allowed: names of folders below"),
        ({"adapters": ["~/x"]}, r"names the folder '~/x', which is missing"),
        ({"adapters": [""]}, r"adapters in "),
        ({"adapters": "1"}, r"adapters in .* is '1'; allowed: a list"),
        ({"adapters": ["1", "3"]}, r"names the folder '3', which is missing"),
        ({"token_adapters": {"2": "../1"}}, r"token_adapters in .* allowed: names of folders below"),
        ({"token_adapters": {"3": "1"}}, r"token_adapters in .* ratios among 2, 4, 8"),
        ({"token_adapters": [2]}, r"token_adapters in "),
        ({"base": None, "adapters": ["."]}, r"has no base for the adapter beside it"),
        ({"layers": 5}, r"reranker.json says that the base has 5 layers, but it has \d"),
        ({"start_layer": 3}, r"updates \d layer-wise heads"),
        ({"max_length": 0}, r"max_length in .* is 0; allowed: an integer of at least 1"),
        ({"passage_max_length": 9}, "has passage_max_length, which no matroyshka model has"),
    ],
)  # fmt: skip
def test_a_description_that_cannot_be_trusted_is_refused(saved: Path, fields: dict[str, Any], message: str) -> None:
    change(saved, **fields)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s)saved.*{message}"):
        MatroyshkaReranker(saved).compute_score(PAIRS)


def test_a_link_out_of_the_folder_is_refused(saved: Path) -> None:
    (saved / "out").symlink_to(MODELS / "adapter_sd")
    change(saved, adapters=["out"])
    with pytest.raises(ValueError, match=r"names 'out', a link to a folder outside its own"):
        MatroyshkaReranker(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "someone/else"}, r"base is 'someone/else' in reranker.json, but '.* in adapter_config.json"),
        ({"prompt": "Is it?"}, "has prompt, which no rankllama model has"),
        ({"adapters": []}, r"adapters in .* is \[\]; a rankllama model with a base has \['\.'\]"),
        ({"base": None}, r"adapters in .* is \['\.'\]; a rankllama model without a base has \[\]"),
        ({"layers": 77}, "the base has 77 layers, but it has"),
        ({"max_length": 512}, "has max_length, which no rankllama model has"),
        ({"query_max_length": "9"}, "query_max_length in .* is '9'; allowed: an integer of at least 1"),
        ({"title_field": "title"}, "has an unknown field 'title_field'"),
        ({"kind": "matroyshka"}, "describes a matroyshka model; open it with MatroyshkaReranker"),
    ],
)
def test_a_rankllamas_description_is_checked(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    ours = RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32")
    ours.save(tmp_path / "saved")
    change(tmp_path / "saved", **fields)
    with pytest.raises(ValueError, match=message):
        RankLLaMAReranker(tmp_path / "saved").compute_score(PAIRS)


def test_a_model_on_the_hub_opens_by_its_id(cached: Cache, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached.add("owner/base", MODELS / "mistral_base", "b" * 40, "main")
    change(saved, base="owner/base")
    cached.add("owner/saved", saved, "a" * 40, "main", "v1")
    for shape in ({}, POOLED, {**POOLED, "compress_ratio": 4}):
        same(MatroyshkaReranker("owner/saved", dtype="float32", **shape), reranker(**shape))
        same(MatroyshkaReranker("owner/saved@v1", dtype="float32").at(**shape), reranker(**shape))
    opened = MatroyshkaReranker("owner/saved", adapters="1", dtype="float32", **POOLED)
    same(opened, reranker(adapters=ADAPTERS[0], token_adapters={}, **POOLED))
    with pytest.raises(ValueError, match="start_layer=1: model='owner/saved' was trained with start_layer 2"):
        MatroyshkaReranker("owner/saved", start_layer=1).compute_score(PAIRS)
    folders = MatroyshkaReranker("owner/saved", dtype="float32").save(saved.parent / "again")
    assert [folder.name for folder in folders] == ["1", "2"]
    same(MatroyshkaReranker(saved.parent / "again", dtype="float32", **POOLED), reranker(**POOLED))


def test_a_rankllama_adapter_over_another_base_keeps_its_own_description(tmp_path: Path) -> None:
    ours = rankllama(input_format="tevatron-2024", passage_max_length=90)
    ours.save(tmp_path / "saved")
    base = shutil.copytree(MODELS / "rankllama_base", tmp_path / "base")
    opened = RankLLaMAReranker(tmp_path / "saved", base_model=base, dtype="float32")
    assert ids_of(opened, LONG) == ids_of(ours, LONG)
    same(opened, ours)


def test_making_a_reranker_of_a_hub_model_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = MatroyshkaReranker("nobody/nothing", **POOLED)
    assert repr(deep.at(cutoff=3)).startswith("MatroyshkaReranker('nobody/nothing', cutoff=3")
    with pytest.raises(ConnectionError, match="nobody/nothing"):
        deep.compute_score(PAIRS)


def train(reranker: Any) -> None:
    rows = frame(2, 3)
    reranker.fit(rows, rows.assign(label=[1, 0, 0] * 2)[["qid", "docno", "label"]])


SETTINGS = {"group_size": 2, "max_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 1}


def test_a_trained_matroyshka_opens_by_its_folder(tmp_path: Path) -> None:
    recipe = {**SETTINGS, "compress_layers": (1,), "train_method": "distill"}
    distill = DistillTraining(**recipe, compress_ratios=(1,), output_dir=str(tmp_path / "distilled"))
    ours = MatroyshkaReranker.untrained(BASE, start_layer=2, prompt="Is it?", training=distill, dtype="float32")
    train(ours)
    opened = MatroyshkaReranker(tmp_path / "distilled", dtype="float32")
    same(opened, ours)
    token = CompensateTraining(
        **recipe, finetune_type="token", compress_ratios=(2,), start_layer=2, prompt="Is it?",
        output_dir=str(tmp_path / "token"),
    )  # fmt: skip
    again = MatroyshkaReranker(tmp_path / "distilled", training=token, dtype="float32")
    train(again)
    shutil.rmtree(tmp_path / "distilled")  # the later one has a copy
    resumed = token.open(str(tmp_path / "token"))  # and training continues over it
    assert [Path(str(adapter.name)).name for adapter in resumed.adapters] == ["adapter-1"]
    compensated = MatroyshkaReranker(tmp_path / "token", dtype="float32")
    same(compensated, reranker(adapters=[str(tmp_path / "token" / "adapter-1")], token_adapters={}))
    assert repr(compensated.at(**POOLED)).endswith(" over adapter-1, token")


def test_a_recipe_names_only_lengths_that_are_not_the_originals() -> None:
    checkpoint = RankLLaMATraining().open(str(MODELS / "rankllama_base"))
    described = RankLLaMATraining().described_inputs(checkpoint)
    assert described.keys() == {"input_format"}  # 196 in training, 164 in reranking
    own = RankLLaMATraining(query_max_length=20, passage_max_length=90).described_inputs(checkpoint)
    assert (own["query_max_length"], own["passage_max_length"]) == (20, 90)


def test_a_trained_rankllama_opens_by_its_folder(tmp_path: Path) -> None:
    recipe = RankLLaMATraining(**SETTINGS, passage_max_length=90, output_dir=str(tmp_path / "run"))
    ours = RankLLaMAReranker.untrained(str(MODELS / "rankllama_base"), training=recipe, dtype="float32")
    train(ours)
    assert read_json(tmp_path / "run" / "reranker.json")["kind"] == "rankllama"
    opened = RankLLaMAReranker(tmp_path / "run", dtype="float32")
    same(opened, ours)
    assert ids_of(opened, LONG) == ids_of(ours, LONG) == ids_of(rankllama(passage_max_length=90), LONG)


@pytest.mark.parametrize("kind", [RankLLaMAReranker, MatroyshkaReranker])
def test_a_fitted_reranker_keeps_its_own_lengths(kind: Any, tmp_path: Path) -> None:
    settings = {**SETTINGS, "output_dir": str(tmp_path / "run")}
    if kind is RankLLaMAReranker:
        recipe, given = RankLLaMATraining(**settings), {"passage_max_length": 90}
        base = str(MODELS / "rankllama_base")
    else:
        recipe = DistillTraining(**settings, compress_layers=(1,), compress_ratios=(1,), train_method="distill")
        given, base = {"max_length": 90, "query_max_length": 20, "start_layer": 2}, BASE
    ours = kind.untrained(base, training=recipe, dtype="float32", **given)
    train(ours)
    opened = kind(tmp_path / "run", dtype="float32")
    assert ids_of(opened, LONG) == ids_of(ours, LONG)
    rows = frame(2, 3)
    np.testing.assert_allclose(opened.transform(rows)["score"], ours.transform(rows)["score"], atol=1e-5)
    ours.save(tmp_path / "saved")
    assert ids_of(kind(tmp_path / "saved", dtype="float32"), LONG) == ids_of(ours, LONG)


@pytest.mark.parametrize("way", ["fit", "command"])
def test_a_rankllama_that_is_trained_further_keeps_its_lengths(way: str, tmp_path: Path) -> None:
    lengths = {"query_max_length": 64, "passage_max_length": 512}
    rankllama(**lengths).save(tmp_path / "saved")
    if way == "fit":
        recipe = RankLLaMATraining(**SETTINGS, output_dir=str(tmp_path / "run"))
        ours = RankLLaMAReranker(tmp_path / "saved", training=recipe, dtype="float32")
        train(ours)
        assert ids_of(ours, LONG) == ids_of(rankllama(**lengths), LONG)
    else:
        data = written(tmp_path / "train.jsonl", *(json.dumps(record) + "\n" for record in RECORDS))
        main("rankllama", (
            f"--model_name_or_path {tmp_path / 'saved'} --train_data {data} --output_dir {tmp_path / 'run'} "
            "--train_group_size 2 --max_steps 1 --report_to none --use_cpu --disable_tqdm 1"
        ).split())  # fmt: skip
    opened = RankLLaMAReranker(tmp_path / "run", dtype="float32")
    assert ids_of(opened, LONG) == ids_of(rankllama(**lengths), LONG)


def test_given_lengths_win_over_the_recipes_in_fit(tmp_path: Path) -> None:
    recipe = RankLLaMATraining(**SETTINGS, passage_max_length=120, output_dir=str(tmp_path / "run"))
    ours = RankLLaMAReranker.untrained(
        str(MODELS / "rankllama_base"), training=recipe, passage_max_length=90, dtype="float32"
    )
    train(ours)
    assert read_json(tmp_path / "run" / "reranker.json")["passage_max_length"] == 90
    assert ids_of(RankLLaMAReranker(tmp_path / "run", dtype="float32"), LONG) == ids_of(ours, LONG)
