LR=1.2e-4
deepspeed --num_gpus 8 pretrain_gpt.py --num-layers 24 --hidden-size 2048 --micro-batch-size 2 \
    --deepspeed --deepspeed_config megatron-deepspeed-298.ds.json --zero-stage 3
