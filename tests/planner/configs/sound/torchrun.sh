#!/bin/bash
#SBATCH --gpus-per-node=8
set -euo pipefail
torchrun --nproc_per_node 8 run_clm.py --model_name_or_path gpt2 --output_dir out --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 --learning_rate 2e-5 --num_train_epochs 1 \
    --bf16 true --gradient_checkpointing true --deepspeed trainer-auto.json
