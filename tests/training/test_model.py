"""Scores, losses and gradients in training are those of the original training programs."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, golden
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from pyterrier_llmrerank.checkpoints.input_format import InputFormat
from pyterrier_llmrerank.checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint
from pyterrier_llmrerank.checkpoints.rankllama_checkpoint import RankLLaMACheckpoint
from pyterrier_llmrerank.engine.inputs import Ids, RankLLaMAInputs
from pyterrier_llmrerank.engine.packing import PackedPairs
from pyterrier_llmrerank.training.lora import LowRankLinear
from pyterrier_llmrerank.training.model import RankingModel
from pyterrier_llmrerank.training.objectives import CascadeLoss, cross_entropy

FILES = [golden(f"matroyshka_train_{name}.json") for name in ("self_distillation", "compensation")]
RUNS = [(run, file["batches"][run["batch"]]) for file in FILES for run in file["runs"]]


def matroyshka(base: str, merged: list[str], start_layer: int) -> RankingModel:
    checkpoint = MatroyshkaCheckpoint(str(MODELS / base), [str(MODELS / name) for name in merged], start_layer)
    return RankingModel(checkpoint, checkpoint.heads(checkpoint.tokenizer()))


def opened(name: str) -> torch.nn.Module:
    """The model of a golden run: a base, perhaps with a merged adapter and an adapter to train."""
    base, *adapters = name.split("+")
    merged = [a.removeprefix("merge(").removesuffix(")") for a in adapters if a.startswith("merge")]
    model = matroyshka(base, merged, 1 if base == "mistral_deep" else 2)
    for adapter in adapters:
        if not adapter.startswith("merge"):
            config = PeftConfig.from_pretrained(MODELS / adapter)
            config.task_type = None  # it says CAUSAL_LM, for which PEFT wants a model that generates
            config._register_custom_module({torch.nn.Linear: LowRankLinear})  # as in training
            return PeftModel.from_pretrained(model, MODELS / adapter, config=config, is_trainable=True)
    return model


def rows_of(batch: dict[str, Any]) -> PackedPairs:
    parts = zip(
        *(batch[name] for name in ("input_ids", "attention_mask", "query_lengths", "prompt_lengths")), strict=True
    )
    return PackedPairs(
        [Ids(ids[:q], ids[q : sum(mask) - p], ids[sum(mask) - p : sum(mask)]) for ids, mask, q, p in parts]
    )


def by_intent(run: dict[str, Any]) -> bool:
    """Tell whether the original weighted a pooling by a padding token, which we do not.

    Rows of different lengths have padding, and so have equal ones once pooling has shortened them unequally.
    """
    pools = run["compress_ratio"] > 1
    return pools and (run["batch"] == "mixed" or sum(layer > 0 for layer in run["effective_compress_layers"]) > 1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("run", "batch"), RUNS, ids=[run["id"] for run, _ in RUNS])
def test_losses_and_gradients_are_the_original_ones(
    run: dict[str, Any], batch: dict[str, Any], checkpointing: bool
) -> None:
    model = opened(run["model"])
    if checkpointing:
        model.train()
        model.activation_checkpointing_enable()
    rows = rows_of(batch)
    student = model(rows, run["effective_compress_layers"], run["compress_ratio"])
    with torch.no_grad():
        full = model(rows)
    method = run["train_method"].split(" ")[0]  # without the note on what was patched
    groups = (-1, 2, 4)
    teacher = torch.tensor(batch["teacher_scores"]).view(2, 4)
    loss = CascadeLoss(method)(student.view(groups), full.view(groups), teacher)
    loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    norm = torch.stack(squares).sum().sqrt().item()
    assert torch.isfinite(loss)
    if by_intent(run):
        # Rows that are the longest, and stay so, have no padding at any layer.
        lengths = np.stack([rows.lengths, rows.pooled(run["compress_ratio"]).lengths])
        whole = (lengths == lengths.max(1, keepdims=True)).all(0)
        torch.testing.assert_close(student[:, whole], torch.tensor(run["scores"])[:, whole], atol=2e-4, rtol=0)
        return
    torch.testing.assert_close(student, torch.tensor(run["scores"]), atol=2e-4, rtol=0)
    assert loss.item() == pytest.approx(run["loss"], rel=1e-4)
    assert norm == pytest.approx(run["total_grad_norm"], rel=1e-3)
    named = dict(model.named_parameters())
    for name, wanted in run["grad_norms"].items():
        assert named[name].grad.norm().item() == pytest.approx(wanted, rel=1e-3), name


def test_rankllamas_loss_and_gradients_are_the_original_ones() -> None:
    train = golden("rankllama.json")["train"]
    base = RankLLaMACheckpoint(str(MODELS / "rankllama_adapter"), str(MODELS / "rankllama_base"))
    head = base.heads(base.tokenizer())
    base.adapters = ()
    model = RankingModel(base, head)
    lora = LoraConfig(
        r=32,
        lora_alpha=64,
        target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        modules_to_save=["score"],
    )
    peft = get_peft_model(model, lora)
    stored = load_file(MODELS / "rankllama_adapter" / "adapter_model.safetensors")
    values = {name.replace(".weight", ".default.weight"): tensor for name, tensor in stored.items() if "lora" in name}
    missing = peft.load_state_dict(values, strict=False)
    assert not missing.unexpected_keys
    pairs = [
        (example["query"], InputFormat().body(p["text"], p.get("title")))
        for example in train["examples"]
        for p in example["positive_passages"] + example["negative_passages"]
    ]
    ids = RankLLaMAInputs(32, 64, margin=3)(base.tokenizer(), pairs)
    assert [pair.flat() for pair in ids] == [
        row[: sum(mask)] for row, mask in zip(train["input_ids"], train["attention_mask"], strict=True)
    ]
    scores = peft(PackedPairs(ids))
    torch.testing.assert_close(scores[0], torch.tensor(train["scores"]), atol=2e-4, rtol=0)
    loss = cross_entropy(scores.view(2, 4))
    loss.backward()
    assert loss.item() == pytest.approx(train["loss"], rel=1e-4)
    named = dict(peft.named_parameters())
    for name, wanted in train["grad_norms"].items():
        assert named[name].grad.norm().item() == pytest.approx(wanted, rel=1e-3), name
    total = torch.stack([p.grad.square().sum() for p in peft.parameters() if p.grad is not None]).sum().sqrt()
    assert total.item() == pytest.approx(train["total_grad_norm"], rel=1e-3)


@pytest.mark.parametrize("shape", [(), ((2, 4), 2)], ids=["full", "pooled"])
def test_the_deepest_layer_runs_for_last_tokens_alone_with_the_same_gradients(
    shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = rows_of(FILES[0]["batches"]["mixed"])
    gradients = []
    for whole in (False, True):
        model = matroyshka("mistral_base", [], 2)
        monkeypatch.setattr(model, "runs_whole_layers", lambda whole=whole: whole)
        ran: list[torch.Size] = []
        gate = model.model.layers[-1].mlp.gate_proj
        gate.register_forward_hook(lambda _, inputs, __, ran=ran: ran.append(inputs[0].shape))
        model(batch, *shape).square().mean().backward()
        assert (ran[0].numel() == len(batch) * 64) is not whole
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-4)


def test_dropout_of_attention_runs_the_whole_deepest_layer() -> None:
    model = matroyshka("mistral_base", [], 2)
    assert not model.runs_whole_layers()
    model.config.attention_dropout = 0.1
    assert model.runs_whole_layers()
