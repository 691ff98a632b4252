#!/usr/bin/env bash
# The effect of each part of the recipe: short runs of equal steps from embedded-base on `commands`, with public commands only.
# Usage: bash examples/ablation.sh [FOLDER]    about 20 minutes on one core; continues where an earlier call stopped.
# The environment variables STEPS, BATCH, LR, LORA_LR and ROWS (of the test split) change it.
set -euo pipefail
runs=${1:-ablation-runs}
STEPS=${STEPS:-120} BATCH=${BATCH:-16} LR=${LR:-1e-3} LORA_LR=${LORA_LR:-5e-3} ROWS=${ROWS:-80}
dropout=(--pmax 0.2)
exit_loss=(--escale 1 --exit-weights uniform --curriculum rotational --rotation 4)
no_dropout=(--pmax 0)
no_exit_loss=(--curriculum none)
names=()

run() { # NAME FLAGS...: trains and measures one setting
    names+=("$1")
    if [ ! -f "$runs/$1/config.json" ]; then
        layerskip finetune --recipe finetune --model embedded-base --steps "$STEPS" --batch-size "$BATCH" --lr "$LR" --seed 0 --threads 1 \
            --output "$runs/$1" --overwrite "${@:2}"
    fi
    if [ ! -f "$runs/$1.json" ]; then
        layerskip sweep-exits --model "$runs/$1" --samples "$ROWS" --exits 6,12 --specs 6 --threads 1 --format json >"$runs/$1.part"
        mv "$runs/$1.part" "$runs/$1.json"
    fi
}

run none "${no_dropout[@]}" "${no_exit_loss[@]}"
run dropout "${dropout[@]}" "${no_exit_loss[@]}"
run exit-loss "${no_dropout[@]}" "${exit_loss[@]}"
run both "${dropout[@]}" "${exit_loss[@]}"
run both-distill "${dropout[@]}" "${exit_loss[@]}" --distill 0.5
run both-lora "${dropout[@]}" "${exit_loss[@]}" --lora-rank 16 --lr "$LORA_LR"

python3 - "$runs" "${names[@]}" <<'END'
import json
import sys
from pathlib import Path

runs, *names = sys.argv[1:]
print("| run | exact match at exit 6 / 12 / full depth | perplexity of the reference | accepted of 6 drafts at 6 / 12 |")
print("|---|---|---|---|")
for name in names:
    results = json.loads(Path(runs, f"{name}.json").read_text())["results"]
    by_setting = {(result["strategy"], result["exit_layer"]): result for result in results}
    depths = [by_setting["early-exit", 6], by_setting["early-exit", 12], by_setting["autoregressive", None]]
    quality = " / ".join(f"{depth['metrics']['exact_match']:.1%}" for depth in depths)
    perplexity = " / ".join(f"{depth['perplexity']:.2f}" for depth in depths)
    accepted = " / ".join(f"{by_setting['self-speculative', layer]['acceptance_rate']:.0%}" for layer in (6, 12))
    print(f"| {name} | {quality} | {perplexity} | {accepted} |")
END
