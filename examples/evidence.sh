#!/usr/bin/env bash
# The paper's claims about its recipe, at the scale of two CPU cores: short trainings of several seeds, compared with intervals.
# Usage: bash examples/evidence.sh RUNS STAGE...
#   parts          Figures 6 and 10, on `commands`: neither, layer dropout, early-exit loss, both; measured at every third exit
#   parts-topv2    the same from the checkpoint $BASE on the TOPv2 folder $TOPV2
#   constant       Figure 12: constant dropout of the same mean, against the exponential runs of `parts`
#   middle         Figure 11: perplexity of middle layers after a training from scratch, with the exit loss and without it
#   scratch        Table 4 and Figure 8: from scratch with S(t), against a control at equal steps, each at the best rate of LRS
#   curricula      gradual against the rotational runs of `parts`, in equal time
# Each stage keeps finished runs and resumes interrupted ones. At its end it prints its table, and writes table and plots to
# RUNS/STAGE. Tuning uses validation rows; exact match is of test rows. SEEDS, LRS, STEPS (of trainings from a base),
# MIDDLE_STEPS, SCRATCH_STEPS and ROWS (of the test split) in the environment change it.
set -euo pipefail
runs=$1
shift
. "$(dirname "$0")/stages.sh"
SEEDS=${SEEDS:-1 2 3} LRS=${LRS:-1e-3 2e-3 4e-3} STEPS=${STEPS:-200} MIDDLE_STEPS=${MIDDLE_STEPS:-600} ROWS=${ROWS:-200}
SCRATCH_STEPS=${SCRATCH_STEPS:-400}
flags=(--threads 1 --save-steps 100)
no_dropout=(--pmax 0)
no_exit_loss=(--curriculum none)

from_base() { # NAME FLAGS...: from embedded-base on `commands`
    train "$1" --recipe finetune --model embedded-base --steps "$STEPS" --batch-size 16 --lr 1e-3 "${@:2}"
}

on_topv2() {
    train "$1" --recipe finetune --model "$BASE" --data "$TOPV2" --steps "$STEPS" --batch-size 16 --lr 1e-3 "${@:2}"
}

from_scratch() { # NAME FLAGS...: fresh weights in the shape of embedded-base, with held-out losses of every exit
    train "$1" --recipe scratch --model embedded-base --batch-size 32 --validation validation --validation-samples 100 "${@:2}"
}

sweep() { # NAME FLAGS...: measures a model, as RUNS/measured/NAME
    measured "measured/$1" sweep-exits --model "$runs/$1" --exits 3:21:3 --specs 6 --split test --samples "$ROWS" \
        --batch-size 50 --timed 8 --threads 1 "${@:2}" >/dev/null
}

of_seeds() { # LABEL PREFIX: LABEL=the runs of all seeds
    local paths
    paths=$(printf "$2-seed%s," $SEEDS)
    echo "$1=${paths%,}"
}

report() { # TITLE compare's arguments
    printf '## %s\n\n' "$1"
    layerskip compare "${@:2}" --format markdown --output "$runs/$1" --overwrite
}

by_seed() { # TITLE NAMES...: compares the measured runs of these names
    local labels=() name
    for name in "${@:2}"; do labels+=("$(of_seeds "$name" "$runs/measured/$name")"); done
    report "$1" "${labels[@]}" --only exact_match,perplexity,acceptance_rate
}

four_parts() { # PREFIX TRAIN SWEEP_FLAGS...: the four settings for every seed
    local seed setting
    for seed in $SEEDS; do
        "$2" "$1none-seed$seed" --seed "$seed" "${no_dropout[@]}" "${no_exit_loss[@]}"
        "$2" "$1dropout-seed$seed" --seed "$seed" "${no_exit_loss[@]}"
        "$2" "$1exit-loss-seed$seed" --seed "$seed" "${no_dropout[@]}"
        "$2" "$1both-seed$seed" --seed "$seed"
        for setting in none dropout exit-loss both; do sweep "$1$setting-seed$seed" "${@:3}"; done
    done
}

parts() {
    four_parts '' from_base
    by_seed parts none dropout exit-loss both
}

parts_topv2() {
    : "${BASE:?a checkpoint that was trained on TOPv2 without the recipe}" "${TOPV2:?the folder of TOPv2}"
    # rows of all domains, which follow each other in the files
    layerskip data --data "$TOPV2" --split test --samples 0 >"$runs/topv2-all.jsonl"
    awk -v every=$(($(wc -l <"$runs/topv2-all.jsonl") / ROWS)) -v most="$ROWS" 'NR % every == 0 && kept++ < most' \
        "$runs/topv2-all.jsonl" >"$runs/topv2-test.jsonl"
    four_parts topv2- on_topv2 --data "$runs/topv2-test.jsonl" --metric exact_match
    by_seed parts-topv2 topv2-none topv2-dropout topv2-exit-loss topv2-both
}

constant() {
    local seed setting
    for seed in $SEEDS; do
        from_base "dropout-seed$seed" --seed "$seed" "${no_exit_loss[@]}"
        from_base "constant-dropout-seed$seed" --seed "$seed" "${no_exit_loss[@]}" --dropout-profile constant
        from_base "both-seed$seed" --seed "$seed"
        from_base "constant-both-seed$seed" --seed "$seed" --dropout-profile constant
        for setting in dropout constant-dropout both constant-both; do sweep "$setting-seed$seed"; done
    done
    by_seed constant dropout constant-dropout
    by_seed constant-with-exit-loss both constant-both
}

middle() {
    local seed
    for seed in $SEEDS; do
        from_scratch "middle-without-seed$seed" --seed "$seed" --steps "$MIDDLE_STEPS" "${no_exit_loss[@]}"
        from_scratch "middle-with-seed$seed" --seed "$seed" --steps "$MIDDLE_STEPS"
    done
    report middle "$(of_seeds without "$runs/middle-without")" "$(of_seeds with "$runs/middle-with")" --exits 6,12,18,24
}

best() { # SETTING: of the learning rates tried, the one with the lowest held-out loss at full depth
    local lr
    for lr in $LRS; do
        python3 -c 'import json, sys
losses = json.load(open(sys.argv[1]))["validation_losses"]
print(losses[max(losses, key=int)], sys.argv[2])' "$runs/tuning-$1-lr$lr-seed9/layerskip.json" "$lr"
    done | sort -g | awk 'NR == 1 { print $2 }'
}

scratch() {
    local lr seed setting names=() chosen
    declare -A settings=([control]="${no_dropout[*]} ${no_exit_loss[*]}" [dropout]="${no_exit_loss[*]}" [recipe]='')
    for setting in control dropout recipe; do
        for lr in $LRS; do
            from_scratch "tuning-$setting-lr$lr-seed9" --seed 9 --steps "$SCRATCH_STEPS" --lr "$lr" ${settings[$setting]}
        done
        chosen=$setting-lr$(best "$setting")
        names+=("$chosen")
        for seed in $SEEDS; do
            from_scratch "$chosen-seed$seed" --seed "$seed" --steps "$SCRATCH_STEPS" --lr "${chosen##*-lr}" ${settings[$setting]}
            sweep "$chosen-seed$seed"
        done
    done
    by_seed scratch "${names[@]}"
}

curricula() {
    local seed
    for seed in $SEEDS; do
        from_base "both-seed$seed" --seed "$seed"
        # gradual steps that take as long as $STEPS rotational ones (measured)
        from_base "gradual-seed$seed" --seed "$seed" --curriculum gradual --steps $((STEPS * 77 / 100))
        for setting in both gradual; do sweep "$setting-seed$seed"; done
    done
    by_seed curricula both gradual
}

for stage in "$@"; do
    case $stage in
        parts | constant | middle | scratch | curricula) "$stage" ;;
        parts-topv2) parts_topv2 ;;
        *) echo "error: STAGE must be parts, parts-topv2, constant, middle, scratch or curricula, got $stage" >&2 && exit 1 ;;
    esac
done
