#!/usr/bin/env bash
# Rebuilds both embedded models, and the control they are judged by, with public commands only: about four hours on two cores.
# Usage: bash examples/embedded.sh [FOLDER]    (`embedded-base` gives only the shape: 24 layers, 160 wide)
set -euo pipefail
runs=${1:-embedded-runs}
plain=(--pmax 0 --curriculum none)
one_core=(--batch-size 32 --threads 1 --save-steps 100)

# embedded-base: from scratch without the recipe, with a tokenizer trained on its rows; then on, with both cores.
layerskip finetune --regime scratch --model embedded-base --vocab-size 1024 "${plain[@]}" \
    --lr 2e-3 --steps 1800 --seed 0 --output "$runs/scratch" --dtype bf16 "${one_core[@]}"
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m layerskip_cli finetune --model "$runs/scratch" "${plain[@]}" \
    --lr 2e-3 --steps 1250 --seed 1 --output "$runs/base" --batch-size 24 --dtype bf16 --threads 1 --save-steps 250

# embedded: the base under the recipe. The control sees the same rows for the same steps without it. One a core, side by side.
layerskip finetune --model "$runs/base" --pmax 0.1 --escale 0.3 --exit-weights uniform --curriculum rotational --rotation 4 \
    --lr 1.5e-3 --steps 1400 --seed 2 --output "$runs/embedded" "${one_core[@]}" &
layerskip finetune --model "$runs/base" "${plain[@]}" --lr 1.5e-3 --steps 1400 --seed 2 --output "$runs/control" "${one_core[@]}"
wait

# What the model card says. Answers come from batches; speed is measured prompt by prompt on 32 of the rows.
measure=(layerskip sweep-exits --exits 6,8,12,18 --specs 6 --batch-size 100 --timed 32 --threads 1 --format markdown)
for split in test compositional; do
    for name in embedded control base; do
        "${measure[@]}" --model "$runs/$name" --split "$split" --samples 5000 --output "$runs/$name-$split"
    done
done
layerskip sweep-exits --model "$runs/embedded" --samples 40 --threads 1 --save
