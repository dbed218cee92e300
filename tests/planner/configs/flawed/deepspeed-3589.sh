# 3D parallelism
TP=2
PP=2
deepspeed --num_gpus 8 pretrain_gpt.py \
    --tensor-model-parallel-size ${TP} --pipeline-model-parallel-size ${PP} \
    --micro-batch-size 2 --global-batch-size 16 --seq-length 2048 \
    --deepspeed --deepspeed_config deepspeed-3589.ds.json
