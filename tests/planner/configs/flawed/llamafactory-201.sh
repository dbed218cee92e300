accelerate launch --config_file llamafactory-201.accelerate.yaml src/train_sft.py \
    --model_name_or_path gpt2 --do_train --finetuning_type full --output_dir out \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --learning_rate 5e-5 \
    --max_grad_norm 0.5 --num_train_epochs 3 --fp16
