#!/usr/bin/env bash
# Rebuilds both embedded models, and the control that they are judged by, with public commands only. Two to three hours on one core.
# Usage: bash examples/embedded.sh [FOLDER]    (embedded-base gives the shape: 24 layers, 160 wide; its weights are not used)
set -euo pipefail
runs=${1:-embedded-runs}
common=(--data commands --batch-size 32 --dtype bf16 --threads 1 --save-steps 250)

# Seed 0: from scratch, without the recipe, with a tokenizer of its own.
layerskip finetune --regime scratch --model embedded-base --vocab-size 1024 --pmax 0 --curriculum none \
    --lr 2e-3 --steps 1800 --seed 0 --output "$runs/base" "${common[@]}"

# Seed 1: the recipe, and the control: the same rows and steps without it.
layerskip finetune --model "$runs/base" --pmax 0.2 --escale 1.0 --curriculum rotational --rotation 8 \
    --lr 1e-3 --steps 400 --seed 1 --output "$runs/embedded" "${common[@]}"
layerskip finetune --model "$runs/base" --pmax 0 --curriculum none \
    --lr 1e-3 --steps 400 --seed 1 --output "$runs/control" "${common[@]}"

# What the model card says.
for name in base embedded control; do
    layerskip sweep-exits --model "$runs/$name" --samples 200 --exits 6,8,12,18 --specs 6 --output "$runs/$name/sweep" --format markdown
    layerskip sweep-exits --model "$runs/$name" --split compositional --samples 200 --exits 6,8,12,18 --specs 6 --format markdown
done
