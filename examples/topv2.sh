#!/usr/bin/env bash
# The paper's own task, TOPv2 (8 domains): trains a base model from scratch, then continues it with the recipe, and without the
# recipe for as many steps as a control. Then measures both.
# Usage: bash examples/topv2.sh FOLDER [RUNS]    FOLDER holds DOMAIN_{train,eval,test}.tsv.
# EPOCHS, RECIPE_EPOCHS and ROWS in the environment change the size. On two cores with AVX-512 BF16, an epoch of the base takes
# 25 to 45 minutes, recipe and control (side by side) take as long, and measuring takes 20 minutes.
# Finished stages are kept: after an interruption, run it again.
set -euo pipefail
here=$(dirname "$0")
data=$1 runs=${2:-topv2-runs} epochs=${EPOCHS:-2} recipe_epochs=${RECIPE_EPOCHS:-0.6} rows=${ROWS:-5000}
. "$here/stages.sh"
recipe=(--recipe finetune --pmax 0.05 --escale 0.5 --exit-weights uniform --curriculum all --exits 6,12,18)
flags=(--data "$data" --batch-size 32 --threads 1 --save-steps 500)

layerskip data --data "$data" --split validation --samples 1000 >"$runs/validation.jsonl"
layerskip data --data "$data" --split test --samples "$rows" >"$runs/test.jsonl"

# The base model: the shape of `embedded` (24 layers, 160 wide), with a new tokenizer. One epoch per run.
from=(--recipe scratch --pmax 0 --curriculum none --model embedded-base --vocab-size 1024)
answered=()
for epoch in $(seq "$epochs"); do
    train "epoch-$epoch" "${from[@]}" --lr 2e-3 --epochs 1 --seed "$epoch"
    answer "epoch-$epoch" validation
    from=(--recipe none --model "$runs/epoch-$epoch")
    answered=("$runs/epoch-$epoch-validation.jsonl" "${answered[@]}")
done
python "$here/parsing_tables.py" "$runs/validation.jsonl" "${answered[@]}"

# The recipe and its control, one core each.
next=(--model "$runs/epoch-$epochs" --lr 1.5e-3 --epochs "$recipe_epochs" --seed 9)
train recipe "${next[@]}" "${recipe[@]}" &
train control "${next[@]}" --recipe none
wait $!

# Answers are decoded in batches. Speed is measured one prompt at a time, on 60 rows.
for name in recipe control; do
    answer "$name" test
    measured "$name-sweep" sweep-exits --model "$runs/$name" --task topv2 --data "$data" --split test --samples "$rows" \
        --batch-size 50 --timed 60 --threads 1 --exits 6,12,18 --specs 6,8
done
python "$here/parsing_tables.py" "$runs/test.jsonl" "$runs/recipe-test.jsonl" "$runs/control-test.jsonl"
