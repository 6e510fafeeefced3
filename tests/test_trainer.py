"""The loop learns, saves what opens again with the same scores, and resumes as if never interrupted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, words
from transformers import TrainingArguments

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints import MatroyshkaCheckpoint, RankLLaMACheckpoint
from pyterrier_llmrerank.inputs import MatroyshkaInputs, RankLLaMAInputs
from pyterrier_llmrerank.training.data import Collator, Groups
from pyterrier_llmrerank.training.objectives import CascadeLoss
from pyterrier_llmrerank.training.trainer import GroupTrainer, Widths, save, with_lora

BASE = str(MODELS / "mistral_base")
RECORDS = [
    {"query": topic, "pos": [f"{words(i, 6)} {topic}"], "neg": [words(100 + i + k, 7) for k in range(4)]}
    for i, topic in enumerate(["panda", "coffee", "volcano", "tide", "train", "glacier", "bread", "whale"])
]


def trainer(folder: Path, method: str = "normal", **options: Any) -> GroupTrainer:
    torch.manual_seed(0)
    checkpoint = MatroyshkaCheckpoint(BASE, [], 4)
    tokenizer = checkpoint.tokenizer()
    model = with_lora(checkpoint, checkpoint.heads(tokenizer), rank=4, alpha=8)
    settings = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "seed": 3, "gradient_checkpointing": True,
    }  # fmt: skip
    collate = Collator(tokenizer, lambda prompt: MatroyshkaInputs(query_max_length=8, total=60))
    widths = Widths((4, 6), (1, 2), seed=3)
    arguments = TrainingArguments(**(settings | options))
    return GroupTrainer(model, arguments, Groups(RECORDS, 4, seed=3), collate, CascadeLoss(method), widths)


def losses(run: GroupTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["normal", "distill_fix_layer"])
def test_it_learns_and_what_is_saved_scores_the_same(tmp_path: Path, method: str) -> None:
    run = trainer(tmp_path, method, max_steps=25)
    run.train()
    assert np.mean(losses(run)[-5:]) < 0.7 * np.mean(losses(run)[:5])
    save(run.model, tmp_path / "adapter", "CAUSAL_LM")
    reranker = MatroyshkaReranker(BASE, adapters=[tmp_path / "adapter"], start_layer=4, cutoff=[4, 8], dtype="float32")
    weights = reranker._weights()
    pair = ("panda", words(5, 9))
    _, _, tokenizer = weights.at_depth(1)
    (ids,) = reranker._encode(tokenizer, [pair])
    from pyterrier_llmrerank.scoring import spans_of

    run.model.eval()
    with torch.inference_mode():
        wanted = run.model(torch.tensor([ids.flat()]), spans_of([ids]))
    np.testing.assert_allclose(reranker.compute_score(pair), wanted[[0, -1], 0].numpy(), atol=1e-4)


def test_rankllama_is_the_same_loop_with_one_head(tmp_path: Path) -> None:
    checkpoint = RankLLaMACheckpoint(str(MODELS / "rankllama_adapter"), str(MODELS / "rankllama_base"))
    tokenizer = checkpoint.tokenizer()
    checkpoint.adapters = ()
    torch.manual_seed(0)
    model = with_lora(checkpoint, torch.randn(1, 64) / 8, rank=4, modules=["q_proj", "v_proj"])
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    records = [
        {
            "query": record["query"],
            "positive_passages": [{"text": record["pos"][0]}],
            "negative_passages": [{"text": text} for text in record["neg"]],
        }
        for record in RECORDS
    ]
    collate = Collator(tokenizer, lambda prompt: RankLLaMAInputs(8, 40, margin=3))
    run = GroupTrainer(model, arguments, Groups(records, 4, seed=0), collate, CascadeLoss("normal"))
    run.train()
    assert np.mean(losses(run)[-5:]) < 0.7 * np.mean(losses(run)[:5])
    save(model, tmp_path / "adapter", "SEQ_CLS")
    reranker = RankLLaMAReranker(tmp_path / "adapter", base_model=MODELS / "rankllama_base", dtype="float32")
    better = [reranker.compute_score([(r["query"], r["pos"][0]), (r["query"], r["neg"][0])]) for r in RECORDS]
    assert np.mean([positive > negative for positive, negative in better]) >= 0.75
    from peft import PeftConfig

    assert PeftConfig.from_pretrained(tmp_path / "adapter").task_type == "SEQ_CLS"


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", max_steps=8, gradient_accumulation_steps=2)
    whole.train()
    first = trainer(tmp_path / "cut", max_steps=8, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3)
    first.train()
    again = trainer(tmp_path / "cut", max_steps=8, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    np.testing.assert_allclose(losses(again)[-5:], losses(whole)[-5:], rtol=1e-5)
    for name, parameter in whole.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(dict(again.model.named_parameters())[name], parameter, atol=1e-6, rtol=1e-5)


def test_accumulation_is_averaging(tmp_path: Path) -> None:
    at_once = trainer(tmp_path, max_steps=2, per_device_train_batch_size=4)
    at_once.widths = Widths()
    at_once.train()
    in_parts = trainer(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    in_parts.widths = Widths()
    in_parts.train()
    np.testing.assert_allclose(losses(in_parts), losses(at_once), rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d+ \(learning rate .*compress_ratio"):
        run.train()


def test_widths_are_a_function_of_the_place_in_the_run() -> None:
    widths = Widths((4, 8, 12), (1, 2, 4))
    drawn = [widths.draw(step, part) for step in range(200) for part in range(2)]
    assert drawn == [widths.draw(step, part) for step in range(200) for part in range(2)]
    assert {ratio for _, ratio in drawn} == {1, 2, 4}
    for layer in (4, 8, 12):
        assert 0.4 < np.mean([layer in layers for layers, _ in drawn]) < 0.6
