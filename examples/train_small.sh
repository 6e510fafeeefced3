#!/usr/bin/env bash
# Train the small models' adapters, unattended, on one GPU of 80 GB: RankLLaMA and, beside it, Matroyshka's distillation,
# then its compensation; and measure them on the held-out queries. The two trainings took 310 s on an H100, and use 60 GB.
#
#     bash examples/train_small.sh DATA OUTPUT
#
# DATA holds folders train and train_more (docs.jsonl.gz, train.ids.jsonl.gz) and teacher/minilm.jsonl.gz. The mixture of
# sources and the queries held out of it are those of the adapters that come with the package.
set -euo pipefail
data=$1 output=$2
examples=$(dirname "$0")
mkdir -p "$output"

if [ ! -f "$output/mixture.jsonl" ]; then
    python3 "$examples/training_mixture.py" "$output/mixture.jsonl" "$data/train" "$data/train_more" \
        --teacher "$data/teacher/minilm.jsonl.gz" --negatives 12 --held_out "$examples/held_out.txt" --seed 29 --take \
        msmarco-dev=7000 insuranceqa=9000 clapnq=2204 qed-nq-dev=1355 wikiqa=999 selqa=2374 boolq=4000 \
        squad-v1.1-dev=4500 squad-train-nqg=4000 squadshifts-newwiki=1500 squadshifts-reddit=600 \
        squadshifts-amazon=400 nfcorpus-train=2582 medquad=3000 covidqa=700 pubmedqa=1000
fi

# Groups of 8, so that a step of 32 queries has 256 pairs.
train() {
    python3 -m pyterrier_llmrerank train "$1" --train_data "$output/mixture.jsonl" --group_size 8 \
        --gradient_accumulation_steps 1 --query_max_len 32 --absolute_margin 0 --bf16 --warmup_steps 0.05 \
        --lr_scheduler_type cosine --logging_steps 20 --report_to none --dataloader_num_workers 6 \
        --gradient_checkpointing False --disable_tqdm True --seed 2026 "${@:2}"
}

# Store an adapter in fp16, as it is published; later steps and measurements then read the same numbers.
halve() {
    python3 - "$1/adapter_model.safetensors" <<'PYTHON'
import sys
import torch
from safetensors.torch import load_file, save_file
save_file({k: v.to(torch.float16).contiguous() for k, v in load_file(sys.argv[1]).items()}, sys.argv[1], {"format": "pt"})
PYTHON
}

(
    train rankllama --model_name_or_path smollm2-135m --output_dir "$output/rankllama" --passage_max_length 163 \
        --per_device_train_batch_size 32 --max_steps 500 --save_steps 250 \
        --lora_rank 24 --lora_alpha 48 --lora_dropout 0 --learning_rate 6e-4 --teacher_weight 1
    halve "$output/rankllama"
) >"$output/rankllama.log" 2>&1 &
rankllama=$!
trap 'kill "$rankllama" 2>/dev/null || true' EXIT

train distill --model_name_or_path smollm2-135m --output_dir "$output/distilled" --passage_max_len 160 \
    --per_device_train_batch_size 32 --max_steps 500 --save_steps 250 \
    --lora_rank 24 --lora_alpha 48 --learning_rate 6e-4 \
    --train_method distill_fix_layer_teacher --compress_layers 8 16 --compress_ratios 1 2 4 >"$output/distilled.log" 2>&1
halve "$output/distilled"

compensate() {
    train compensate --model_name_or_path smollm2-135m --raw_peft "$output/distilled" --output_dir "$output/$1" \
        --passage_max_len 160 --per_device_train_batch_size 32 --max_steps 50 --save_steps 50 \
        --lora_rank 4 --lora_alpha 8 --learning_rate 5e-4 --compress_layers 8 16 \
        --train_method distill_fix_layer_teacher "${@:2}" >"$output/$1.log" 2>&1
    halve "$output/$1"
}
compensate layer --finetune_type layer
compensate token-2 --finetune_type token --compress_ratios 2
compensate token-4 --finetune_type token --compress_ratios 4
wait "$rankllama"

measure() {
    python3 "$examples/measure_held_out.py" "$output/mixture.held_out.jsonl" "$@"
}
measure --rankllama "$output/rankllama"
measure --matroyshka "$output/distilled" "$output/layer"
measure --matroyshka "$output/distilled" "$output/token-2" --ratio 2
measure --matroyshka "$output/distilled" "$output/token-4" --ratio 4
