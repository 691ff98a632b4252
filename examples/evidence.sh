#!/usr/bin/env bash
# The paper's claims about its recipe, at the scale of two CPU cores: short trainings of several seeds, compared with intervals.
# Usage: bash examples/evidence.sh RUNS STAGE...
#   parts          Figures 6 and 10, on `commands`: neither, layer dropout, early-exit loss, both; measured at every third exit
#   parts-topv2    the same from the checkpoint $BASE on the TOPv2 folder $TOPV2
#   constant       Figure 12: constant dropout of the same mean, against the exponential runs of `parts`
#   middle         Figure 11: perplexity of middle layers over a training from scratch, with the exit loss and without it
#   scratch        Table 4 and Figure 8: from scratch with S(t), against a control at equal steps, each at the best rate of LRS
#   curricula      gradual against the rotational runs of `parts`, in equal time
# Each stage says what it will take, keeps what is finished, and goes on where it was interrupted. At its end it prints its table
# and the cost of each training, and writes table and plots to RUNS/STAGE. What is tuned is tuned on validation rows; tables of
# exact match are of test rows. SEEDS, STEPS, BATCH, LR, SCRATCH_STEPS, SCRATCH_BATCH, LRS, EXITS, SPEC, ROWS (of the test split)
# and HELD_OUT (rows of the validation split) in the environment change it.
set -euo pipefail
runs=$1
shift
SEEDS=${SEEDS:-1 2 3} STEPS=${STEPS:-300} BATCH=${BATCH:-16} LR=${LR:-1e-3}
SCRATCH_STEPS=${SCRATCH_STEPS:-600} SCRATCH_BATCH=${SCRATCH_BATCH:-32} LRS=${LRS:-1e-3 2e-3 4e-3} TUNING_SEED=${TUNING_SEED:-9}
EXITS=${EXITS:-3:21:3} SPEC=${SPEC:-6} ROWS=${ROWS:-300} HELD_OUT=${HELD_OUT:-100}
no_dropout=(--pmax 0)
no_exit_loss=(--curriculum none)
measures=exact_match,perplexity,acceptance_rate
mkdir -p "$runs/measured"

say() { echo "$*" >&2; }

expect() { # TRAININGS STEPS BATCH SWEEPS: the time of a stage on one core with AVX-512, if nothing of it is there
    say "$stage: $1 trainings of $2 steps of $3 rows, $4 sweeps of $ROWS rows;" \
        "about $((($1 * ($2 * $3 / 40 + 20) + $4 * ($ROWS / 4 + 20)) / 60)) minutes without what is finished"
}

train() { # NAME FLAGS...: one training, resumed if it was interrupted; what it took is added to costs.tsv
    [ -f "$runs/$1/config.json" ] && return
    local resume='' before=$SECONDS status=0
    ls "$runs/$1"/checkpoints/*/run.json >/dev/null 2>&1 && resume=--resume
    say "training $1"
    times >"$runs/$1.before"
    layerskip finetune --threads 1 --save-steps 100 --output "$runs/$1" $resume "${@:2}" || status=$?
    times >"$runs/$1.after"
    printf '%s\t%s\t%s\n' "$1" $((SECONDS - before)) "$(processor_seconds "$runs/$1.before" "$runs/$1.after")" >>"$runs/costs.tsv"
    return $status
}

processor_seconds() { # BEFORE AFTER: of the children between these outputs of `times`; both are removed
    awk 'FNR == 2 { split($1, user, /[ms]/); split($2, kernel, /[ms]/)
        now = 60 * (user[1] + kernel[1]) + user[2] + kernel[2]
        if (NR == FNR) before = now; else print now - before }' "$1" "$2"
    rm "$1" "$2"
}

sweep() { # NAME FLAGS...: measures a model, as RUNS/measured/NAME
    [ -f "$runs/measured/$1/results.json" ] && return
    say "measuring $1"
    layerskip sweep-exits --model "$runs/$1" --exits "$EXITS" --specs "$SPEC" --samples "$ROWS" --batch-size 50 --timed 8 \
        --threads 1 --output "$runs/measured/$1" "${@:2}" >/dev/null
}

of_seeds() { # LABEL PREFIX: LABEL=the runs of all seeds
    local paths=() seed
    for seed in $SEEDS; do paths+=("$2-seed$seed"); done
    (IFS=,; echo "$1=${paths[*]}")
}

report() { # compare's arguments, the first of them PATTERN of the trainings whose costs are shown
    echo "## $stage"
    echo
    layerskip compare "${@:2}" --format markdown --output "$runs/$stage" --overwrite
    echo
    echo "| training | seconds | processor seconds |"
    echo "|---|---|---|"
    awk -F '\t' -v names="$1" '$1 ~ names { wall[$1] += $2; own[$1] += $3 }
        END { for (name in wall) printf "| %s | %d | %.0f |\n", name, wall[name], own[name] }' "$runs/costs.tsv" | sort
}

from_base() { # NAME FLAGS...: from embedded-base on `commands`
    train "$1" --recipe finetune --model embedded-base --steps "$STEPS" --batch-size "$BATCH" --lr "$LR" "${@:2}"
}

from_scratch() { # NAME FLAGS...: fresh weights in the shape of embedded-base, with held-out losses of every exit
    train "$1" --recipe scratch --model embedded-base --steps "$SCRATCH_STEPS" --batch-size "$SCRATCH_BATCH" \
        --validation validation --validation-samples "$HELD_OUT" "${@:2}"
}

four_parts() { # PREFIX TRAIN SWEEP_FLAGS...: the four settings for every seed
    local prefix=$1 train=$2 seed setting
    for seed in $SEEDS; do
        "$train" "${prefix}none-seed$seed" --seed "$seed" "${no_dropout[@]}" "${no_exit_loss[@]}"
        "$train" "${prefix}dropout-seed$seed" --seed "$seed" "${no_exit_loss[@]}"
        "$train" "${prefix}exit-loss-seed$seed" --seed "$seed" "${no_dropout[@]}"
        "$train" "${prefix}both-seed$seed" --seed "$seed"
        for setting in none dropout exit-loss both; do sweep "$prefix$setting-seed$seed" "${@:3}"; done
    done
}

parts() {
    expect $((4 * count)) "$STEPS" "$BATCH" $((4 * count))
    four_parts '' from_base
    report '^(none|dropout|exit-loss|both)-' "$(of_seeds none "$runs/measured/none")" \
        "$(of_seeds dropout "$runs/measured/dropout")" "$(of_seeds exit-loss "$runs/measured/exit-loss")" \
        "$(of_seeds both "$runs/measured/both")" --only "$measures"
}

on_topv2() {
    train "$1" --recipe finetune --model "$BASE" --data "$TOPV2" --steps "$STEPS" --batch-size "$BATCH" --lr "$LR" "${@:2}"
}

parts_topv2() {
    : "${BASE:?a checkpoint that was trained on TOPv2 without the recipe}" "${TOPV2:?the folder of TOPv2}"
    expect $((4 * count)) "$STEPS" "$BATCH" $((4 * count))
    if [ ! -f "$runs/topv2-test.jsonl" ]; then # rows of all domains, which follow each other in the files
        layerskip data --data "$TOPV2" --split test --samples 0 >"$runs/topv2-test.part"
        awk -v every=$(($(wc -l <"$runs/topv2-test.part") / ROWS)) -v most="$ROWS" \
            'NR % every == 0 && kept++ < most' "$runs/topv2-test.part" >"$runs/topv2-test.whole"
        mv "$runs/topv2-test.whole" "$runs/topv2-test.jsonl"
    fi
    four_parts topv2- on_topv2 --data "$runs/topv2-test.jsonl" --metric exact_match
    report '^topv2-' "$(of_seeds none "$runs/measured/topv2-none")" "$(of_seeds dropout "$runs/measured/topv2-dropout")" \
        "$(of_seeds exit-loss "$runs/measured/topv2-exit-loss")" "$(of_seeds both "$runs/measured/topv2-both")" --only "$measures"
}

constant() {
    expect $((4 * count)) "$STEPS" "$BATCH" $((4 * count))
    local seed setting
    for seed in $SEEDS; do
        from_base "dropout-seed$seed" --seed "$seed" "${no_exit_loss[@]}"
        from_base "constant-dropout-seed$seed" --seed "$seed" "${no_exit_loss[@]}" --dropout-profile constant
        from_base "both-seed$seed" --seed "$seed"
        from_base "constant-both-seed$seed" --seed "$seed" --dropout-profile constant
        for setting in dropout constant-dropout both constant-both; do sweep "$setting-seed$seed"; done
    done
    report '^(constant-)?(dropout|both)-' "$(of_seeds dropout "$runs/measured/dropout")" \
        "$(of_seeds constant-dropout "$runs/measured/constant-dropout")" --only "$measures"
    stage=constant-with-exit-loss
    report '^(constant-)?both-' "$(of_seeds both "$runs/measured/both")" \
        "$(of_seeds constant-both "$runs/measured/constant-both")" --only "$measures"
}

middle() {
    expect $((2 * count)) "$SCRATCH_STEPS" "$SCRATCH_BATCH" 0
    local seed
    for seed in $SEEDS; do
        from_scratch "middle-without-seed$seed" --seed "$seed" "${no_exit_loss[@]}"
        from_scratch "middle-with-seed$seed" --seed "$seed"
    done
    report '^middle-' "$(of_seeds without "$runs/middle-without")" "$(of_seeds with "$runs/middle-with")" --exits 6,12,18,24
}

best() { # PREFIX: of the learning rates tried, the one with the lowest held-out loss at full depth
    local lr
    for lr in $LRS; do
        python3 -c 'import json, sys
losses = json.load(open(sys.argv[1]))["validation_losses"]
print(losses[max(losses, key=int)], sys.argv[2])' "$runs/$1-lr$lr-seed$TUNING_SEED/layerskip.json" "$lr"
    done | sort -g | awk 'NR == 1 { print $2 }'
}

scratch() {
    local lr seed setting tried=($LRS) labels=() chosen
    expect $((3 * ${#tried[@]} + 3 * count)) "$SCRATCH_STEPS" "$SCRATCH_BATCH" $((3 * count))
    declare -A flags=([control]="${no_dropout[*]} ${no_exit_loss[*]}" [dropout]="${no_exit_loss[*]}" [recipe]='')
    for setting in control dropout recipe; do
        for lr in $LRS; do
            from_scratch "tuning-$setting-lr$lr-seed$TUNING_SEED" --seed "$TUNING_SEED" --lr "$lr" ${flags[$setting]}
            labels+=("$setting-lr$lr=$runs/tuning-$setting-lr$lr-seed$TUNING_SEED")
        done
    done
    stage=scratch-learning-rates
    report '^tuning-' "${labels[@]}" --exits 24
    stage=scratch
    labels=()
    for setting in control dropout recipe; do
        chosen=$(best "tuning-$setting")
        say "$setting: learning rate $chosen"
        for seed in $SEEDS; do
            from_scratch "$setting-lr$chosen-seed$seed" --seed "$seed" --lr "$chosen" ${flags[$setting]}
            sweep "$setting-lr$chosen-seed$seed"
        done
        labels+=("$(of_seeds "$setting-lr$chosen" "$runs/measured/$setting-lr$chosen")")
    done
    report '^(control|dropout|recipe)-lr' "${labels[@]}" --only "$measures"
}

curricula() {
    expect $((2 * count)) "$STEPS" "$BATCH" $((2 * count))
    local seed steps=$((STEPS * 77 / 100)) # take as long as $STEPS rotational ones (measured)
    for seed in $SEEDS; do
        from_base "both-seed$seed" --seed "$seed"
        from_base "gradual-seed$seed" --seed "$seed" --curriculum gradual --steps "$steps"
        for setting in both gradual; do sweep "$setting-seed$seed"; done
    done
    report '^(both|gradual)-' "$(of_seeds rotational "$runs/measured/both")" "$(of_seeds gradual "$runs/measured/gradual")" \
        --only "$measures"
}

count=$(wc -w <<<"$SEEDS")
for stage in "$@"; do
    case $stage in
        parts | constant | middle | scratch | curricula) "$stage" ;;
        parts-topv2) parts_topv2 ;;
        *) say "error: STAGE must be parts, parts-topv2, constant, middle, scratch or curricula, got $stage" && exit 1 ;;
    esac
done
