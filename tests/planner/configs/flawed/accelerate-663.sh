export CUDA_VISIBLE_DEVICES=2,4,5,7
deepspeed --num_gpus 4 run_clm.py --model_name_or_path gpt2 --output_dir out --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 --learning_rate 2e-5 --num_train_epochs 1 \
    --fp16 --deepspeed accelerate-663.ds.json
