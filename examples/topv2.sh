#!/usr/bin/env bash
# The paper's own task: TOPv2 (8 domains), from scratch without the recipe, then the recipe, and a control of equal steps.
# Usage: bash examples/topv2.sh FOLDER [RUNS]    FOLDER holds DOMAIN_{train,eval,test}.tsv; EPOCHS, STEPS and ROWS change the size.
# Two cores at 3,500 tokens/s: 30 minutes an epoch, 70 for recipe and control, and an hour to measure 5,000 rows.
set -euo pipefail
data=$1 runs=${2:-topv2-runs} epochs=${EPOCHS:-3} steps=${STEPS:-1400} rows=${ROWS:-5000}
plain=(--pmax 0 --curriculum none)
# Answers come from batches; speed is measured prompt by prompt on 50 of the rows.
measure=(layerskip sweep-exits --task topv2 --data "$data" --batch-size 50 --timed 50 --threads 1 --format markdown)

# The base: the embedded shape, 24 layers and 160 wide, with a tokenizer of its own. An epoch a run, both cores.
from=(--regime scratch --model embedded-base --vocab-size 1024)
for epoch in $(seq "$epochs"); do
    [ -f "$runs/epoch-$epoch/config.json" ] || OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m layerskip_cli finetune \
        "${from[@]}" "${plain[@]}" --data "$data" --lr 2e-3 --epochs 1 --batch-size 16 --seed "$epoch" --threads 1 \
        --save-steps 500 --output "$runs/epoch-$epoch"
    "${measure[@]}" --model "$runs/epoch-$epoch" --split validation --samples $((rows / 5)) --exits 12 --specs 6
    from=(--model "$runs/epoch-$epoch")
done

# The recipe and its control, side by side, a core each.
next=("${from[@]}" --data "$data" --lr 1.5e-3 --steps "$steps" --batch-size 32 --seed 9 --threads 1 --save-steps 250)
layerskip finetune "${next[@]}" --pmax 0.1 --escale 0.3 --exit-weights uniform --rotation 4 --output "$runs/recipe" &
layerskip finetune "${next[@]}" "${plain[@]}" --output "$runs/control"
wait

for name in recipe control "epoch-$epochs"; do
    "${measure[@]}" --model "$runs/$name" --samples "$rows" --exits 6,12,18 --specs 6,8 --output "$runs/$name-results"
done
