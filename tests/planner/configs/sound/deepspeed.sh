deepspeed --include localhost:0,1,2,3 train.py --deepspeed --deepspeed_config plain-zero1.json
