#!/usr/bin/env bash
# Train the small models' adapters, unattended, on one GPU: RankLLaMA, then Matroyshka's distillation and compensation.
#
#     bash examples/train_small.sh DATA OUTPUT
#
# DATA holds folders train and train_more (docs.jsonl.gz, train.ids.jsonl.gz) and teacher/minilm.jsonl.gz. The mixture of
# sources and the queries held out of it are those of the adapters that come with the package. Planned for 25 minutes on
# an H100, of which RankLLaMA and the distillation take ten each; not yet run on a GPU.
set -euo pipefail
data=$1 output=$2
examples=$(dirname "$0")
train="python -m pyterrier_llmrerank train"
mkdir -p "$output"

python "$examples/training_mixture.py" "$output/mixture.jsonl" "$data/train" "$data/train_more" \
    --teacher "$data/teacher/minilm.jsonl.gz" --negatives 12 --held_out "$examples/held_out.txt" --seed 29 --take \
    msmarco-dev=7000 insuranceqa=6000 clapnq=2204 qed-nq-dev=1355 wikiqa=999 selqa=2374 boolq=4000 squad-v1.1-dev=3500 \
    squad-train-nqg=1500 squadshifts-newwiki=1500 squadshifts-reddit=600 squadshifts-amazon=400 nfcorpus-train=2582 \
    medquad=3000 covidqa=700 pubmedqa=1000

common="--train_data $output/mixture.jsonl --group_size 8 --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 1 --query_max_len 32 --lora_rank 16 --lora_alpha 32 --bf16 --warmup_steps 0.05 \
    --lr_scheduler_type cosine --logging_steps 50 --save_steps 300 --report_to none --dataloader_num_workers 4 \
    --gradient_checkpointing False --seed 2026"

$train rankllama --model_name_or_path smollm2-135m --output_dir "$output/rankllama" $common \
    --passage_max_length 131 --teacher_weight 2 --absolute_margin 0 --lora_dropout 0 --learning_rate 4e-4 --max_steps 2400

$train distill --model_name_or_path smollm2-135m --output_dir "$output/distilled" $common \
    --passage_max_length 128 --absolute_margin 0 --learning_rate 4e-4 --max_steps 1500 \
    --train_method distill_fix_layer_teacher --compress_layers 8 16 --compress_ratios 1 2 4

compensate="$train compensate --model_name_or_path smollm2-135m --raw_peft $output/distilled $common \
    --passage_max_length 128 --lora_rank 8 --lora_alpha 16 --learning_rate 1e-4 --max_steps 300 --compress_layers 8 16"
$compensate --finetune_type layer --output_dir "$output/layer"
for ratio in 2 4; do
    $compensate --finetune_type token --compress_ratios "$ratio" --output_dir "$output/token-$ratio"
done
