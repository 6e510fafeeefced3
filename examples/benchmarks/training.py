"""Measure tokens trained per second, beside a plain Trainer loop over transformers and PEFT.

    python examples/benchmarks/training.py DATA.jsonl --model FOLDER_OR_HUB_ID
    python examples/benchmarks/training.py DATA.jsonl --threads 1 2  # on a CPU

Both use RankLLaMA's recipe and train the same LoRA modules and score head on the same groups in the same order,
with transformers' Trainer, in the same precision. The plain loop uses AutoModelForSequenceClassification, padded
batches with attention masks, and cross-entropy over each group. The two take turns, so that other load on the
machine affects both. Medians over the rounds are printed, for each number of threads; with several, training itself
chooses how many of them it uses. Padding does not count as tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from pyterrier_llmrerank.checkpoints.locate import folder_of
from pyterrier_llmrerank.training import RankLLaMATraining
from pyterrier_llmrerank.training.batches import Batch, Collator, Groups
from pyterrier_llmrerank.training.data import open_data
from pyterrier_llmrerank.training.lora import with_lora
from pyterrier_llmrerank.training.trainer import GroupTrainer


class Clock(TrainerCallback):
    """Seconds and losses of the steps after the first, which still prepares."""

    def __init__(self) -> None:
        self.begun = self.seconds = 0.0
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step > 1:
            self.seconds += time.perf_counter() - self.begun

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])


class PlainTrainer(Trainer):
    """Cross-entropy over groups on a sequence classification model."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch: Batch = inputs["batch"]
        packed = batch.packed
        mask = (torch.arange(packed.longest) < torch.from_numpy(packed.lengths)[:, None]).long()
        # Such models find their last token by its not being the padding token.
        ids = torch.from_numpy(packed.ids[packed.places]).masked_fill(mask == 0, model.config.pad_token_id)
        logits = model(input_ids=ids.to(self.args.device), attention_mask=mask.to(self.args.device)).logits
        groups = logits.float().view(-1, batch.size)
        return torch.nn.functional.cross_entropy(
            groups, torch.zeros(len(groups), dtype=torch.long, device=groups.device)
        )


def plain_model(folder: Path, heads: torch.Tensor, recipe: RankLLaMATraining, pad: int) -> PeftModel:
    """Return a sequence classification model with PEFT's LoRA layers; trainable weights are fp32."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=heads.dtype)
    classifier.config.pad_token_id = pad
    classifier.score.weight.data = heads
    lora = LoraConfig(
        task_type="SEQ_CLS", r=recipe.lora_rank, lora_alpha=int(recipe.lora_alpha),
        target_modules=list(recipe.target_modules),
    )  # fmt: skip
    plain = get_peft_model(classifier, lora)
    for parameter in plain.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return plain


def turn(train: Callable[[TrainingArguments], Trainer], steps: int, queries: int) -> Clock:
    """Train for some steps, and return their seconds and losses."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output, max_steps=steps, per_device_train_batch_size=queries, bf16=True,
            learning_rate=1e-5, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = train(arguments)
        trainer.add_callback(clock)
        trainer.train()
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="JSON lines")
    parser.add_argument("--model", default="smollm2-135m", help="a causal language model: folder, .gguf file or hub id")
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--queries", type=int, default=1, help="a step")
    parser.add_argument("--passage_max_length", type=int, default=196)
    parser.add_argument("--steps", type=int, default=6, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="of a CPU")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    chosen = parser.parse_args()

    recipe = RankLLaMATraining(
        group_size=chosen.group_size, passage_max_length=chosen.passage_max_length, lora_dropout=0.0
    )
    folder = folder_of(chosen.model, "model")
    checkpoint = recipe.open(str(folder))
    tokenizer = checkpoint.tokenizer()
    heads = recipe.heads(checkpoint, tokenizer, recipe.seed)
    groups = Groups(open_data("data", [chosen.data]), recipe.group_size, recipe.seed, recipe.body)
    collate = Collator(tokenizer, recipe.inputs)
    plain = plain_model(folder, heads.bfloat16(), recipe, tokenizer.pad_token_id or 0)
    ours = with_lora(checkpoint, heads, recipe, torch.bfloat16)
    programs: dict[str, Callable[[TrainingArguments], Trainer]] = {
        "plain": lambda arguments: PlainTrainer(
            plain, arguments, train_dataset=groups, data_collator=lambda drawn: {"batch": collate(drawn)}
        ),
        "ours": lambda arguments: GroupTrainer(ours, arguments, recipe, checkpoint, groups),
    }

    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))  # any sample tells the mean
    sample = [collate([groups[int(index)]]) for index in order[:50]]
    tokens = sum(int(batch.packed.lengths.sum()) for batch in sample) / len(sample) * chosen.queries
    figures = [
        {"threads": threads, "program": name, "tokens_per_second": [], "losses": []}
        for threads in chosen.threads
        for name in programs
    ]
    for _ in range(chosen.rounds):
        for row in figures:
            torch.set_num_threads(row["threads"])
            clock = turn(programs[row["program"]], chosen.steps, chosen.queries)
            row["tokens_per_second"].append(tokens * (chosen.steps - 1) / clock.seconds)
            row["losses"] += clock.losses

    print(f"\n{'threads':8}{'':8}{'tokens/s':>10}{'pairs/s':>10}{'ratio':>8}{'first loss':>12}{'last loss':>11}")
    rates = {(row["threads"], row["program"]): statistics.median(row["tokens_per_second"]) for row in figures}
    for row in figures:
        threads, name, losses = row["threads"], row["program"], row["losses"]
        rate, ratio = rates[threads, name], rates[threads, name] / rates[threads, "plain"]
        pairs = rate / tokens * recipe.group_size * chosen.queries
        print(f"{threads:<8}{name:8}{rate:10.0f}{pairs:10.2f}{ratio:8.2f}{losses[0]:12.4f}{losses[-1]:11.4f}")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
