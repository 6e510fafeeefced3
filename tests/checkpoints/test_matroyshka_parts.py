"""Arguments, the model's description and its adapters' descriptions agree, or are refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RECORDS, Cache, ids_of, written
from test_description import ADAPTERS, BASE, LONG, PAIRS, POOLED, SETTINGS, TOKEN, change, reranker, same, train

from pyterrier_llmrerank import MatroyshkaReranker
from pyterrier_llmrerank.checkpoints.json_files import read_json
from pyterrier_llmrerank.training import CompensateTraining
from pyterrier_llmrerank.training.commands import main


@pytest.mark.parametrize(("name", "value", "own"), [("start_layer", 1, 2), ("layer_sep", 2, 1)])
def test_arguments_that_contradict_the_trained_heads_are_refused(
    tmp_path: Path, name: str, value: int, own: int
) -> None:
    reranker(layer_sep=1).save(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"{name}={value}: model='.*saved' was trained with {name} {own}; allowed"):
        MatroyshkaReranker(tmp_path / "saved", **{name: value})


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A described adapter: for heads from layer 2 on, another prompt and shorter texts than usual."""
    reranker(adapters=ADAPTERS[0], token_adapters={}, max_length=90).save(tmp_path / "described")
    return tmp_path / "described"


@pytest.mark.parametrize(("name", "own", "other"), [("start_layer", 2, 3), ("layer_sep", 1, 2)])
def test_heads_have_one_setting_on_which_descriptions_and_arguments_agree(
    name: str, own: int, other: int, described: Path, tmp_path: Path
) -> None:
    change(described, start_layer=2, layer_sep=1)
    token = shutil.copytree(described, tmp_path / "token")
    change(token, adapters=[], token_adapters={"2": "."})
    wanted = reranker(adapters=ADAPTERS[0], token_adapters={2: ADAPTERS[0]}, max_length=90)
    both: dict[str, Any] = {"adapters": described, "token_adapters": {2: token}, "dtype": "float32"}
    for given in ({}, {name: own}):
        equal(MatroyshkaReranker(BASE, **both, **given), wanted)
    for role in ("adapters", "token_adapters"):
        message = rf"{name}={other}: {role}: '.*' was trained with {name} {own}; allowed: {own}\."
        with pytest.raises(ValueError, match=message):
            MatroyshkaReranker(BASE, **{role: both[role]}, **{name: other})

    change(token, **{name: other})
    message = rf"adapters: '.*described' was trained with {name} {own}, but token_adapters: '.*token' with {other}; the"
    with pytest.raises(ValueError, match=message):
        MatroyshkaReranker(BASE, **both)
    for value, role in ((own, "token_adapters"), (other, "adapters")):  # an argument does not settle it
        with pytest.raises(
            ValueError, match=rf"{name}={value}: {role}: .* was trained with {name} {own + other - value};"
        ):
            MatroyshkaReranker(BASE, **both, **{name: value})
    reranker(adapters=ADAPTERS[0], token_adapters={}, layer_sep=1).save(tmp_path / "model")
    message = rf"token' was trained with {name} {other}, but model='.*model' with {own}; the two must agree"
    with pytest.raises(ValueError, match=message):
        MatroyshkaReranker(tmp_path / "model", token_adapters={2: token})


@pytest.mark.parametrize("role", ["adapters", "token_adapters"])
@pytest.mark.parametrize("place", ["local", "hub"])
def test_an_adapter_over_a_base_keeps_its_own_description(
    role: str, place: str, described: Path, cached: Cache
) -> None:
    cached.add("owner/adapter", described, "a" * 40, "main")
    name = str(described) if place == "local" else "owner/adapter"
    if role == "adapters":
        opened, wanted = MatroyshkaReranker(BASE, adapters=name, dtype="float32"), MatroyshkaReranker(described)
    else:
        change(described, adapters=[], token_adapters={"2": "."})
        opened = MatroyshkaReranker(BASE, token_adapters={2: name}, dtype="float32", **POOLED)
        wanted = MatroyshkaReranker(described, **POOLED)
    assert ids_of(opened, LONG) == ids_of(wanted, LONG) == ids_of(reranker(max_length=90), LONG)
    same(opened, type(wanted)(described, dtype="float32", **(POOLED if role == "token_adapters" else {})))
    given = {role: name if role == "adapters" else {2: name}}
    with pytest.raises(ValueError, match=rf"start_layer=3: {role}: '.*' was trained with start_layer 2; allowed: 2"):
        MatroyshkaReranker(BASE, **given, start_layer=3, **POOLED).compute_score(PAIRS)
    other = MatroyshkaReranker(BASE, **given, prompt="Why?", max_length=512, **POOLED)
    assert ids_of(other, LONG) == ids_of(reranker(prompt="Why?"), LONG)


def test_adapters_that_disagree_are_refused(described: Path, tmp_path: Path) -> None:
    other = shutil.copytree(described, tmp_path / "other")
    change(other, prompt="Why?", adapters=["1", "."])
    with pytest.raises(
        ValueError, match=r"described' was trained with prompt 'Is it\?', but .*other' with 'Why\?'; the"
    ):
        MatroyshkaReranker(BASE, adapters=[described, other])
    reranker(adapters=ADAPTERS[0], token_adapters={}).save(tmp_path / "model")
    change(other, adapters=["."])
    message = r"other' was trained with prompt 'Why\?', but model='.*model' with 'Is it\?'; the two must agree"
    with pytest.raises(ValueError, match=message):
        MatroyshkaReranker(tmp_path / "model", adapters=other)
    asked = MatroyshkaReranker(tmp_path / "model", adapters=other, prompt="Why?", dtype="float32")
    same(asked, reranker(adapters=ADAPTERS[0], token_adapters={}, prompt="Why?", max_length=90))
    change(other, layers=5)
    with pytest.raises(ValueError, match="the base has 5 layers, but it has"):
        MatroyshkaReranker(BASE, adapters=other).compute_score(PAIRS)
    change(other, kind="rankllama", start_layer=None, prompt=None, layers=None, max_length=None)
    with pytest.raises(ValueError, match=r"adapters: '.*other': .* describes a rankllama model; open it with Rank"):
        MatroyshkaReranker(BASE, adapters=other)


def test_lengths_are_the_last_adapters_only_if_it_was_trained_over_the_others(described: Path, tmp_path: Path) -> None:
    """The first was trained with 90 tokens, the second with the default's 512."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(described, first)
    shutil.copytree(described, second)
    change(first, max_length=90)
    change(second, max_length=None, adapters=["adapter-1", "."])
    shutil.copytree(first, second / "adapter-1")
    MatroyshkaReranker(BASE, adapters=[first, second]).compute_score(PAIRS)
    shutil.rmtree(second / "adapter-1")
    shutil.copytree(ADAPTERS[1], second / "adapter-1")
    with pytest.raises(ValueError, match=r"second' was trained on this base over '.*adapter-1', of other weights than"):
        MatroyshkaReranker(BASE, adapters=[first, second])
    change(second, adapters=[], token_adapters={"2": "."})
    with pytest.raises(ValueError, match="first' has query_max_length=67 and max_length=90, but .*second' has 384"):
        MatroyshkaReranker(BASE, adapters=[first, second])


def test_an_adapter_over_fewer_adapters_than_in_its_training_is_refused(described: Path) -> None:
    change(described, adapters=["adapter-1", "."])
    with pytest.raises(
        ValueError, match=r"described' was trained on this base with 1 adapters before it, but here it has 0"
    ):
        MatroyshkaReranker(BASE, adapters=described)
    opened = MatroyshkaReranker(BASE, adapters=[ADAPTERS[1], described], dtype="float32")
    same(opened, reranker(adapters=[ADAPTERS[1], ADAPTERS[0]], token_adapters={}))
    change(described, base="owner/other")  # into which the first may be merged
    same(MatroyshkaReranker(BASE, adapters=described, dtype="float32"), reranker(adapters=ADAPTERS[0]))


def test_a_change_of_an_adapters_description_is_seen(described: Path) -> None:
    opened = MatroyshkaReranker(BASE, adapters=described, dtype="float32")
    change(described, prompt="Why?")
    same(opened, reranker(adapters=ADAPTERS[0], token_adapters={}, prompt="Why?"))


def equal(ours: MatroyshkaReranker, wanted: MatroyshkaReranker) -> None:
    """Assert that two rerankers read the same ids and give the same scores, for texts beyond their lengths too."""
    assert ids_of(ours, LONG) == ids_of(wanted, LONG)
    np.testing.assert_allclose(ours.compute_score([*PAIRS, *LONG]), wanted.compute_score([*PAIRS, *LONG]), atol=3e-5)


@pytest.mark.parametrize("place", ["local", "hub"])
@pytest.mark.parametrize("then", ["score", "save", "merge", "fit"])
def test_the_parts_are_the_same_for_scores_saved_forms_and_training(
    place: str, then: str, described: Path, cached: Cache, tmp_path: Path
) -> None:
    cached.add("owner/adapter", described, "a" * 40, "main")
    training = CompensateTraining(**{**SETTINGS, "learning_rate": 0.0}, output_dir=str(tmp_path / "again"))
    name = described if place == "local" else "owner/adapter"
    ours = MatroyshkaReranker(BASE, adapters=name, dtype="float32", training=training)
    if then == "fit":  # at a rate of zero, it learns nothing
        train(ours)
    elif then != "score":
        ours.save(tmp_path / "again", merged=then == "merge")
    wanted = reranker(adapters=ADAPTERS[0], token_adapters={}, max_length=90)
    equal(ours, wanted)
    if then != "score":
        equal(MatroyshkaReranker(tmp_path / "again", dtype="float32"), wanted)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    """A described token adapter: for heads from layer 2 on and another prompt, of usual lengths."""
    folder = tmp_path / "token"
    reranker(adapters=TOKEN[2], token_adapters={}).save(folder)
    change(folder, adapters=[], token_adapters={"2": "."})
    return folder


@pytest.mark.parametrize("place", ["local", "hub"])
def test_a_token_adapters_description_holds_in_all_shapes(place: str, token: Path, cached: Cache) -> None:
    cached.add("owner/token", token, "a" * 40, "main")
    plain = MatroyshkaReranker(BASE, dtype="float32")
    _ = plain.compute_score(PAIRS)  # these weights have one head alone
    ours = MatroyshkaReranker(BASE, token_adapters={2: token if place == "local" else "owner/token"}, dtype="float32")
    wanted = reranker(adapters=[])
    for shape in ({}, POOLED, {"cutoff": 2}, {**POOLED, "cutoff": 3}):
        equal(ours.at(**shape), wanted.at(**shape))
    for shape in (POOLED, {}):
        opened = MatroyshkaReranker(BASE, token_adapters=ours.token_adapters, dtype="float32", **shape)
        equal(opened, wanted.at(**shape))


@pytest.mark.parametrize("place", ["local", "hub"])
def test_a_token_adapters_lengths_are_not_used_at_full_width(place: str, token: Path, cached: Cache) -> None:
    change(token, max_length=90)
    cached.add("owner/token", token, "a" * 40, "main")
    given: dict[str, Any] = {"token_adapters": {2: token if place == "local" else "owner/token"}, "dtype": "float32"}
    equal(MatroyshkaReranker(BASE, **given, **POOLED), reranker(adapters=[], max_length=90, **POOLED))
    message = r"at full width has query_max_length=384 and max_length=512, but token_adapters: '.*' has 67 and 90; give"
    with pytest.raises(ValueError, match=message):
        MatroyshkaReranker(BASE, **given).compute_score(PAIRS)
    for length in (90, 512):
        for shape in ({}, POOLED):
            explicit = MatroyshkaReranker(BASE, **given, **shape, max_length=length)
            equal(explicit, reranker(adapters=[], max_length=length, **shape))


def test_lengths_that_differ_are_refused_unless_they_are_given(described: Path, token: Path, tmp_path: Path) -> None:
    both = {"adapters": described, "token_adapters": {2: token}, "dtype": "float32"}
    message = r"described' has query_max_length=67 and max_length=90, but token_adapters: '.*token' has 384 and 512"
    with pytest.raises(ValueError, match=message):  # the usual lengths are lengths too
        MatroyshkaReranker(BASE, **both)
    equal(MatroyshkaReranker(BASE, **both, max_length=90), reranker(adapters=ADAPTERS[0], max_length=90))
    change(described, query_max_length=20)
    with pytest.raises(ValueError, match="has query_max_length=20 and max_length=90, but .* has 67 and 90"):
        MatroyshkaReranker(BASE, **both, max_length=90)
    reranker(adapters=ADAPTERS[0], token_adapters={}).save(tmp_path / "merged", merged=True)
    with pytest.raises(ValueError, match=r"merged' has query_max_length=384 .*, but adapters: '.*described' has 20"):
        MatroyshkaReranker(tmp_path / "merged", adapters=described)


def test_a_given_prompt_settles_a_conflict(described: Path, tmp_path: Path) -> None:
    reranker(adapters=ADAPTERS[1], token_adapters={}, prompt="One?").save(tmp_path / "model", merged=True)
    change(described, prompt="Two?", max_length=None)
    with pytest.raises(ValueError, match=r"prompt 'Two\?', but model='.*model' with 'One\?'; the two must agree"):
        MatroyshkaReranker(tmp_path / "model", adapters=described)
    for prompt in ("Two?", "One?", "Three?"):
        ours = MatroyshkaReranker(tmp_path / "model", adapters=described, prompt=prompt, dtype="float32")
        equal(ours, reranker(adapters=[ADAPTERS[1], ADAPTERS[0]], token_adapters={}, prompt=prompt))
    other = shutil.copytree(described, tmp_path / "other")
    change(other, prompt="One?", adapters=["1", "."])
    ours = MatroyshkaReranker(BASE, adapters=[described, other], prompt="One?", dtype="float32")
    equal(ours, reranker(adapters=[ADAPTERS[0], ADAPTERS[0]], token_adapters={}, prompt="One?"))


def test_adapters_from_the_command_line_serve_any_mix_of_depth_and_width(tmp_path: Path) -> None:
    data = written(tmp_path / "train.jsonl", *(json.dumps(record) + "\n" for record in RECORDS))
    settings = (
        f"--model_name_or_path {BASE} --train_data {data} --train_group_size 2 --max_steps 1 --compress_layers 2 "
        "--per_device_train_batch_size 1 --lora_rank 2 --learning_rate 0.01 --warmup_steps 0 --report_to none --use_cpu"
    ).split()

    def run(command: str, name: str, *options: str) -> str:
        return str(main(command, [*settings, "--output_dir", str(tmp_path / name), *options]))

    distilled = run("distill", "distilled", "--train_method", "distill_fix_layer", "--start_layer", "2")
    change(Path(distilled), query_max_length=20, max_length=90)
    over = ("--raw_peft", distilled)
    layer = run("compensate", "layer", *over)
    token = run("compensate", "token2", *over, "--finetune_type", "token", "--compress_ratios", "2")
    for folder in (layer, token):  # training further keeps the lengths
        content = read_json(Path(folder) / "reranker.json")
        assert (content["query_max_length"], content["max_length"]) == (20, 90)
    plain = [tmp_path / f"plain-{Path(name).name}" for name in (distilled, layer, token)]
    for name, copy in zip((distilled, layer, token), plain, strict=True):
        shutil.copytree(name, copy)
        (copy / "reranker.json").unlink()
    trained = {"start_layer": 2, "query_max_length": 20, "max_length": 90, "dtype": "float32"}
    wanted = MatroyshkaReranker(BASE, adapters=plain[:2], token_adapters={2: plain[2]}, **trained)
    for shape in ({}, {"compress_layers": 2, "compress_ratio": 2}, {"cutoff": 4}):
        mixed = MatroyshkaReranker(BASE, adapters=[distilled, layer], token_adapters={2: token}, dtype="float32")
        equal(mixed.at(**shape), wanted.at(**shape))
        equal(MatroyshkaReranker(layer, token_adapters={2: token}, dtype="float32", **shape), wanted.at(**shape))
    mixed.save(tmp_path / "saved")
    equal(MatroyshkaReranker(tmp_path / "saved", dtype="float32").at(**shape), wanted.at(**shape))
    for wrong in ([], [plain[1]], [plain[1], plain[2]]):
        with pytest.raises(ValueError, match=r"token2' was trained on this base over 1 adapters, which are not in"):
            MatroyshkaReranker(BASE, adapters=wrong, token_adapters={2: token}, start_layer=2)


def test_a_description_from_the_hub_does_not_open_the_weights_again(described: Path, cached: Cache) -> None:
    cached.add("owner/adapter", described, "a" * 40, "main")
    ours = MatroyshkaReranker(BASE, adapters="owner/adapter", dtype="float32")
    opened = ours._weights()
    _ = ours.compute_score(PAIRS)
    assert ours._weights() is opened
    assert ours.at(cutoff=4)._weights() is opened
