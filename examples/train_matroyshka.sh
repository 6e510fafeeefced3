#!/usr/bin/env bash
# Train a Matroyshka Re-Ranker as its authors did: Mistral-7B on eight GPUs, first distilled into all its layers,
# then compensated for depth and for each ratio. DATA holds JSON lines: query, pos, neg, pos_scores, neg_scores.
# Needs: pip install "pyterrier-llmrerank[train]" deepspeed
set -euo pipefail
train_data="$(realpath "${1:?usage: train_matroyshka.sh DATA}")"
cd "$(dirname "$0")"

train() {  # a recipe, and what is its own
  torchrun --nproc_per_node 8 -m pyterrier_llmrerank train "$@" \
    --model_name_or_path mistralai/Mistral-7B-v0.1 \
    --train_data "${train_data}" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --dataloader_drop_last True \
    --query_max_len 32 \
    --passage_max_len 192 \
    --train_group_size 16 \
    --logging_steps 1 \
    --save_total_limit 50 \
    --ddp_find_unused_parameters False \
    --gradient_checkpointing \
    --deepspeed deepspeed_zero1.json \
    --warmup_ratio 0.1 \
    --bf16 \
    --use_lora True \
    --lora_rank 32 \
    --lora_alpha 64 \
    --loss_type "only logits" \
    --use_flash_attn False \
    --target_modules q_proj k_proj v_proj o_proj down_proj up_proj gate_proj linear_head \
    --cache_path data_cache \
    --padding_side right \
    --start_layer 4 \
    --layer_sep 1 \
    --layer_wise True \
    --compress_layers 4 8 12 16 20 24 28
}

train distill --output_dir result_self_distillation --learning_rate 2e-4 --save_steps 100 \
  --compress_ratios 1 2 4 8 --train_method distill_fix_layer_teacher

compensate=(--raw_peft result_self_distillation --learning_rate 2e-5 --save_steps 500 --train_method normal)
train compensate "${compensate[@]}" --output_dir result_compensation_layer --compress_ratios 1 --finetune_type layer
for ratio in 2 4 8; do
  train compensate "${compensate[@]}" --output_dir "result_compensation_token_compress_ratio_${ratio}" \
    --compress_ratios "${ratio}" --finetune_type token
done
