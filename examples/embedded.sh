#!/usr/bin/env bash
# Rebuilds both embedded models with public commands only, in about four hours on two cores with AVX-512 BF16.
# Usage: bash examples/embedded.sh [FOLDER]    (`embedded-base` only gives the shape: 24 layers, 160 wide)
# Finished stages are kept: call it again after an interruption.
set -euo pipefail
here=$(dirname "$0")
runs=${1:-embedded-runs}
. "$here/stages.sh"
flags=(--batch-size 32 --threads 1 --save-steps 250)

# From scratch without exits, with a tokenizer trained on its rows; then continued.
train scratch --recipe scratch --pmax 0 --curriculum none --model embedded-base --vocab-size 1024 --lr 2e-3 --steps 1800 --seed 0
train longer --recipe none --model "$runs/scratch" --lr 2e-3 --steps 1250 --batch-size 48 --seed 1
train parent --recipe none --model "$runs/longer" --lr 2e-3 --steps 5000 --seed 11

# The same steps on the same rows with the recipe and without it: `embedded`, and its control `embedded-base`. One core each.
recipe=(--recipe finetune --exit-weights uniform --curriculum all --exits 4,6,8,12,18)
first=(--lr 1.5e-3 --steps 2300 --seed 12)
second=(--lr 1.5e-3 --steps 2000 --seed 14)
{
    train recipe --model "$runs/parent" "${first[@]}" --pmax 0.1 --escale 1 "${recipe[@]}"
    train embedded --model "$runs/recipe" "${second[@]}" --pmax 0.05 --escale 0.5 "${recipe[@]}"
} &
train control --recipe none --model "$runs/parent" "${first[@]}"
train base --recipe none --model "$runs/control" "${second[@]}"
wait $!

# The figures of the model card. Answers come from batches; speed is measured prompt by prompt on 60 of the rows.
for split in test compositional; do
    layerskip data --split "$split" --samples 5000 >"$runs/$split.jsonl"
    for name in embedded base parent; do answer $name $split; done
    measured "embedded-$split" sweep-exits --model "$runs/embedded" --split "$split" --samples 5000 --batch-size 50 --timed 60 \
        --threads 1 --exits 4,6,8,12,18 --specs 6
    python "$here/parsing_tables.py" "$runs/$split.jsonl" "$runs/embedded-$split.jsonl" "$runs/base-$split.jsonl" \
        "$runs/parent-$split.jsonl"
done
layerskip sweep-exits --model "$runs/embedded" --samples 60 --specs 6,8,12 --draft-weights int8 --threads 1
layerskip sweep-exits --model "$runs/embedded" --samples 60 --specs 6,8,12 --threads 1 --save
