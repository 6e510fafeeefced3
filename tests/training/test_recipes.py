"""Recipes hold the original programs' values, and refuse contradictions."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS

from pyterrier_llmrerank.checkpoints.description import Description
from pyterrier_llmrerank.training import CompensateTraining, DistillTraining, RankLLaMATraining
from pyterrier_llmrerank.training.batches import Collator
from pyterrier_llmrerank.training.recipes import Recipe


def test_defaults_are_the_original_programs() -> None:
    rank = RankLLaMATraining()
    assert (rank.lora_rank, rank.lora_alpha, rank.lora_dropout, rank.learning_rate) == (32, 64, 0.1, 1e-4)
    assert (rank.group_size, rank.query_max_length, rank.passage_max_length) == (16, 32, 196)
    assert "k_proj" not in rank.target_modules
    assert not rank.loss.teacher_settings
    assert (rank.per_device_train_batch_size, rank.gradient_accumulation_steps, rank.warmup_steps) == (4, 8, 0.1)
    distill = DistillTraining()
    assert (distill.learning_rate, distill.start_layer, distill.compress_ratios) == (2e-4, 4, (1, 2, 4, 8))
    assert distill.compress_layers == (4, 8, 12, 16, 20, 24, 28)
    assert distill.train_method == "distill_fix_layer_teacher"
    assert "linear_head" in distill.target_modules
    compensate = CompensateTraining()
    assert (compensate.learning_rate, compensate.train_method, compensate.compress_ratios) == (2e-5, "normal", (1,))


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        (RankLLaMATraining, {"group_size": 1}, "group_size=1; allowed: an integer of at least 2"),
        (RankLLaMATraining, {"learning_rate": "fast"}, "learning_rate='fast'"),
        (RankLLaMATraining, {"lora_rank": True}, "lora_rank=True"),
        (RankLLaMATraining, {"patience": 0}, "patience=0"),
        (RankLLaMATraining, {"group_size": 4.5}, "group_size=4.5; allowed: an integer"),
        (RankLLaMATraining, {"seed": "x"}, "seed='x'"),
        (RankLLaMATraining, {"lora_dropout": 7}, "lora_dropout=7; allowed: a number from 0 to less than 1"),
        (RankLLaMATraining, {"arguments": {"max_step": 2}}, r"arguments=\{'max_step': 2\}: .* closest: max_steps,"),
        (
            RankLLaMATraining,
            {"arguments": {"max_steps": 4}},
            r"arguments=\{'max_steps': 4\}: 'max_steps' is a setting of",
        ),
        (RankLLaMATraining, {"target_modules": "q_proj"}, "target_modules='q_proj'; allowed: a list of str"),
        (RankLLaMATraining, {"teacher_weight": -1}, "teacher_weight=-1; allowed: a number of at least 0"),
        (RankLLaMATraining, {"teacher_temperature": 0}, "teacher_temperature=0; allowed: a number above 0"),
        (
            RankLLaMATraining,
            {"teacher_temperature": 2.0},
            "teacher_temperature=2.0: without teacher_weight, it has no eff",
        ),
        (RankLLaMATraining, {"teacher_temperature": 2.0, "absolute_margin": 1.0}, "teacher_temperature=2.0: without"),
        (
            CompensateTraining,
            {"teacher_temperature": 2.0},
            "teacher_temperature=2.0: train_method='normal' has no teach",
        ),
        (RankLLaMATraining, {"absolute_margin": -0.5}, "absolute_margin=-0.5; allowed: a number of at least 0"),
        (CompensateTraining, {"absolute_margin": 0.0}, "absolute_margin=0.0: train_method='normal' has no teacher"),
        (DistillTraining, {"compress_layers": 8}, "compress_layers=8; allowed: a list of int"),
        (DistillTraining, {"train_method": "magic"}, "train_method='magic'; allowed: normal"),
        (DistillTraining, {"compress_ratios": (3,)}, r"compress_ratios=\[3\]"),
        (DistillTraining, {"compress_ratios": ()}, r"compress_ratios=\[\]"),
        (DistillTraining, {"compress_layers": (-1,)}, r"compress_layers=\[-1\]"),
        (DistillTraining, {"start_layer": 0}, "start_layer=0; allowed: an integer of at least 1"),
        (CompensateTraining, {"finetune_type": "depth"}, "finetune_type='depth'; allowed: layer, token"),
        (CompensateTraining, {"compress_ratios": (2,)}, "finetune_type=layer allows 1 alone"),
        (CompensateTraining, {"finetune_type": "token", "compress_ratios": (2, 4)}, "token allows one ratio"),
        (CompensateTraining, {"finetune_type": "token"}, "token allows one ratio"),
    ],
)
def test_settings_are_checked(recipe: type[Recipe], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**settings)


def test_a_score_head_starts_random_or_as_it_is() -> None:
    recipe = RankLLaMATraining()
    base = recipe.open(str(MODELS / "rankllama_base"))
    tokenizer = base.tokenizer()
    assert not base.has_heads
    one, other = (recipe.heads(base, tokenizer, seed) for seed in (1, 2))
    assert one.shape == (1, base.config.hidden_size)
    assert not torch.equal(one, other)
    assert torch.equal(one, recipe.heads(base, tokenizer, 1))
    adapter = recipe.open(str(MODELS / "rankllama_adapter"), base_model=str(MODELS / "rankllama_base"))
    assert torch.equal(recipe.heads(adapter, tokenizer, 1), adapter.heads(tokenizer))
    with pytest.raises(ValueError, match="raw_peft="):
        recipe.open(str(MODELS / "rankllama_base"), ["adapter"])


def test_heads_are_at_the_layers_of_the_recipe_or_the_checkpoint() -> None:
    recipe = DistillTraining(start_layer=2, layer_sep=3)
    assert list(recipe.open(str(MODELS / "mistral_base")).head_layers) == [2, 5, 8]
    own = DistillTraining().open(str(MODELS / "costwise_full"))  # it brings its own
    assert list(own.head_layers) == list(range(own.start_layer, 9, own.layer_sep))
    assert own.layer_wise
    with pytest.raises(ValueError, match="layer_sep=3: model=.* was trained with layer_sep 1"):
        recipe.open(str(MODELS / "costwise_full"))


def test_further_training_keeps_the_described_heads_and_prompt(tmp_path: Path) -> None:
    """Of the model, or else of the last adapter below it. A default of the recipe contradicts nothing."""
    base, adapter, plain = str(MODELS / "mistral_base"), tmp_path / "adapter", tmp_path / "plain"
    for folder in (adapter, plain):
        shutil.copytree(MODELS / "adapter_sd", folder)
    said = Description(kind="matroyshka", base=base, start_layer=2, layer_sep=1, prompt="Is it?", adapters=(".",))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    said.write(adapter)
    for model, adapters in ((str(adapter), []), (base, [str(adapter)]), (base, [str(adapter), str(plain)])):
        checkpoint = DistillTraining().open(model, adapters)
        followed = DistillTraining(group_size=8).following(checkpoint)
        assert list(checkpoint.head_layers) == [2, 3, 4, 5, 6, 7, 8]
        assert followed == DistillTraining(group_size=8, start_layer=2, prompt="Is it?")
        assert followed.described_inputs(checkpoint) == {"prompt": "Is it?"}
        for given in ({"start_layer": 5}, {"layer_sep": 2}, {"prompt": "Relevant?"}):
            with pytest.raises(ValueError, match=f"{next(iter(given))}=.*, but .*adapter.*; the two must agree"):
                DistillTraining(**given).open(model, adapters)
    undescribed = DistillTraining(start_layer=2)
    assert undescribed.following(undescribed.open(base, [str(plain)])) == undescribed


def test_layers_that_would_compress_nothing_are_refused() -> None:
    for layers in ((), (0,), (40,)):
        recipe = CompensateTraining(finetune_type="token", compress_ratios=(2,), compress_layers=layers, start_layer=2)
        with pytest.raises(ValueError, match="nothing would be compressed; allowed: layers from 1 to 7"):
            recipe.open(str(MODELS / "mistral_base"))


def test_recipes_are_values() -> None:
    assert DistillTraining() == DistillTraining()
    assert DistillTraining(arguments={"weight_decay": 1.0}) != DistillTraining()
    assert len({DistillTraining(), DistillTraining(), DistillTraining(seed=1)}) == 2
    recipe = CompensateTraining(group_size=8, arguments={"weight_decay": 0.1})
    assert repr(recipe) == "CompensateTraining(group_size=8, arguments={'weight_decay': 0.1})"
    with pytest.raises(TypeError, match="abstract"):
        Recipe()  # type: ignore[abstract]
    assert pickle.loads(pickle.dumps(Collator(None, recipe.inputs))).inputs(None) == recipe.inputs(None)  # type: ignore[arg-type]
