#!/bin/bash
deepspeed --num_gpus 4 run_ner_crf.py --data_dir data --epochs 3 \
    --deepspeed --deepspeed_config deepspeed-1270.ds.json
