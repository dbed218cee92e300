accelerate launch --config_file accelerate-zero2.yaml train.py \
    --model_name_or_path gpt2 --output_dir out --bf16 true \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --max_grad_norm 1.0 --num_train_epochs 1
