deepspeed --include localhost:1,2 --num_gpus 2 run_clm.py --model_name_or_path gpt2 --output_dir out --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 --learning_rate 2e-5 --num_train_epochs 1 \
    --bf16 --deepspeed deepspeed-2980.ds.json
