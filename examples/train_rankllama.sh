#!/usr/bin/env bash
# Train RankLLaMA as its authors did: Llama-2-7B on MS MARCO passages, on four GPUs of 48 GB.
# Needs: pip install "pyterrier-llmrerank[train]" deepspeed
set -euo pipefail
cd "$(dirname "$0")"

torchrun --nproc_per_node 4 \
  -m pyterrier_llmrerank train rankllama \
  --deepspeed deepspeed_zero3.json \
  --output_dir model_rankllama \
  --model_name_or_path meta-llama/Llama-2-7b-hf \
  --save_steps 200 \
  --dataset_name Tevatron/msmarco-passage \
  --bf16 \
  --per_device_train_batch_size 4 \
  --gradient_accumulation_steps 8 \
  --gradient_checkpointing \
  --train_n_passages 16 \
  --learning_rate 1e-4 \
  --q_max_len 32 \
  --p_max_len 196 \
  --num_train_epochs 1 \
  --logging_steps 10 \
  --overwrite_output_dir \
  --dataset_proc_num 32
