#!/bin/bash
LAUNCHER="torchrun --nproc_per_node 4"
MODEL_ARGS="--model_name_or_path gpt2 --attn_implementation sdpa"
TRAIN_ARGS="
    $MODEL_ARGS --output_dir out --num_train_epochs 1 --bf16 true
    --per_device_train_batch_size 2 --gradient_accumulation_steps 4"
$LAUNCHER run_clm.py $TRAIN_ARGS --deepspeed trainer-auto.json
