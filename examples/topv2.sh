#!/usr/bin/env bash
# The paper's own task: TOPv2 (8 domains), from scratch without the recipe, then the recipe, and a control of equal steps.
# Usage: bash examples/topv2.sh FOLDER [RUNS]    FOLDER holds DOMAIN_{train,eval,test}.tsv; EPOCHS, RECIPE_EPOCHS and ROWS change
# the size. Two cores with AVX-512 BF16: 25 to 45 minutes an epoch of the base, the recipe and the control side by side in as many,
# and 20 to measure. What is already there is kept: call it again after an interruption.
set -euo pipefail
here=$(dirname "$0")
data=$1 runs=${2:-topv2-runs} epochs=${EPOCHS:-2} recipe_epochs=${RECIPE_EPOCHS:-0.6} rows=${ROWS:-5000}
plain=(--pmax 0 --curriculum none)
recipe=(--pmax 0.05 --escale 0.5 --exit-weights uniform --curriculum all --exits 6,12,18)
steps=(--data "$data" --batch-size 32 --threads 1 --save-steps 500)
mkdir -p "$runs"

train() { # NAME FLAGS...: one run, resumed where it was cut short
    [ -f "$runs/$1/config.json" ] && return
    local resume=
    ls "$runs/$1"/checkpoints/*/complete.json >/dev/null 2>&1 && resume=--resume
    layerskip finetune "${steps[@]}" --output "$runs/$1" $resume "${@:2}"
}

answer() { # MODEL SPLIT: its autoregressive answers to the split's rows
    [ -f "$runs/$1-$2.jsonl" ] && return
    layerskip generate --model "$runs/$1" --strategy autoregressive --jsonl --threads 1 <"$runs/$2.jsonl" >"$runs/$1-$2.part"
    mv "$runs/$1-$2.part" "$runs/$1-$2.jsonl"
}

layerskip data --data "$data" --split validation --samples 1000 >"$runs/validation.jsonl"
layerskip data --data "$data" --split test --samples "$rows" >"$runs/test.jsonl"

# The base: the embedded shape, 24 layers and 160 wide, with a tokenizer of its own. An epoch a run.
from=(--regime scratch --model embedded-base --vocab-size 1024)
measured=()
for epoch in $(seq "$epochs"); do
    train "epoch-$epoch" "${from[@]}" "${plain[@]}" --lr 2e-3 --epochs 1 --seed "$epoch"
    answer "epoch-$epoch" validation
    from=(--model "$runs/epoch-$epoch")
    measured=("$runs/epoch-$epoch-validation" "${measured[@]}")
done
python "$here/parsing_tables.py" "$runs/validation.jsonl" "${measured[@]}"

# The recipe and its control, side by side, a core each.
next=("${from[@]}" --lr 1.5e-3 --epochs "$recipe_epochs" --seed 9)
train recipe "${next[@]}" "${recipe[@]}" &
train control "${next[@]}" "${plain[@]}"
wait $!

# Answers come from batches; speed is measured prompt by prompt on 60 of the rows.
for name in recipe control; do
    answer "$name" test
    [ -f "$runs/$name-test/results.json" ] || layerskip sweep-exits --model "$runs/$name" --task topv2 --data "$data" \
        --samples "$rows" --batch-size 50 --timed 60 --threads 1 --exits 6,12,18 --specs 6,8 --output "$runs/$name-test" >&2
done
python "$here/parsing_tables.py" "$runs/test.jsonl" "$runs/recipe-test" "$runs/control-test"
