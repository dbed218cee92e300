PATH_TO_DEEPSPEED_CONFIG=playgroundd/deepspeed_config_s2.json
deepspeed fastchat/train/train_lora.py --model_name_or_path gpt2 --output_dir out --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 --learning_rate 2e-5 --num_train_epochs 1 \
    --bf16 True --deepspeed $PATH_TO_DEEPSPEED_CONFIG
