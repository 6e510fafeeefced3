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
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
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

    dtype = torch.bfloat16
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    classifier.config.pad_token_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    classifier.score.weight.data = heads.to(dtype)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=recipe.lora_rank, lora_alpha=int(recipe.lora_alpha),
        target_modules=list(recipe.target_modules),
    )  # fmt: skip
    plain = get_peft_model(classifier, lora)
    for parameter in plain.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    ours = with_lora(checkpoint, heads, recipe, dtype)

    def turn(kind: str) -> Clock:
        clock = Clock()
        with tempfile.TemporaryDirectory() as output:
            arguments = TrainingArguments(
                output_dir=output, max_steps=chosen.steps, per_device_train_batch_size=chosen.queries, bf16=True,
                learning_rate=1e-5, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
            )  # fmt: skip
            if kind == "plain":
                trainer: Trainer = PlainTrainer(
                    plain, arguments, train_dataset=groups, data_collator=lambda drawn: {"batch": collate(drawn)}
                )
            else:
                trainer = GroupTrainer(ours, arguments, recipe, checkpoint, groups)
            trainer.add_callback(clock)
            trainer.train()
        return clock

    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))  # any sample tells the mean
    sample = [collate([groups[int(index)]]) for index in order[:50]]
    tokens = sum(int(batch.packed.lengths.sum()) for batch in sample) / len(sample) * chosen.queries
    systems = [(threads, kind) for threads in chosen.threads for kind in ("plain", "ours")]
    rates: dict[tuple[int, str], list[float]] = {system: [] for system in systems}
    losses: dict[tuple[int, str], list[float]] = {system: [] for system in systems}
    for _ in range(chosen.rounds):
        for threads, kind in systems:
            torch.set_num_threads(threads)
            clock = turn(kind)
            rates[threads, kind].append(tokens * (chosen.steps - 1) / clock.seconds)
            losses[threads, kind] += clock.losses
    medians = {system: statistics.median(values) for system, values in rates.items()}
    print(f"\n{'threads':8}{'':8}{'tokens/s':>10}{'pairs/s':>10}{'ratio':>8}{'first loss':>12}{'last loss':>11}")
    for (threads, kind), rate in medians.items():
        pairs = rate / tokens * recipe.group_size * chosen.queries
        ratio, of_system = rate / medians[threads, "plain"], losses[threads, kind]
        print(f"{threads:<8}{kind:8}{rate:10.0f}{pairs:10.2f}{ratio:8.2f}{of_system[0]:12.4f}{of_system[-1]:11.4f}")
    if chosen.json:
        figures = [
            {
                "threads": threads,
                "program": kind,
                "tokens_per_second": rates[threads, kind],
                "losses": losses[threads, kind],
            }
            for threads, kind in systems
        ]
        chosen.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
