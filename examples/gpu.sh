#!/usr/bin/env bash
# Verifies and measures the toolkit on a GPU, and writes one report: OUTPUT/report.md, with the commands that made it.
# Usage: bash examples/gpu.sh OUTPUT [MODEL]
# MODEL (default: embedded) is decoded as it is; a short run of the recipe and one of train-drafter begin with BASE (default:
# embedded-base, or MODEL if given). Takes under 20 minutes on any GPU with small models. A stage that fails is reported,
# the others go on, and the exit status is 1. DEVICE=cpu tries the script on a machine without a GPU; STEPS, SAMPLES and REPEATS
# change the size of trainings and measurements. It needs `layerskip` and, for the tests, pytest on the PATH: see environment.sh.
set -euo pipefail
out=${1:?OUTPUT, a folder for the report} model=${2:-embedded} base=${BASE:-${2:-embedded-base}}
device=${DEVICE:-cuda} steps=${STEPS:-60} samples=${SAMPLES:-20} repeats=${REPEATS:-3}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
report=$out/report.md failed=0

stage() { # TITLE COMMAND...: standard output goes to the report, stderr to the terminal
    local title=$1 before=$SECONDS status=0
    shift
    echo "$title: $*" >&2
    "$@" >"$out/stage.txt" || status=$?
    {
        printf '## %s\n\n`%s`\n\n' "$title" "$*"
        cat "$out/stage.txt"
        printf '\n%d s, exit status %d\n\n' $((SECONDS - before)) "$status"
    } >>"$report"
    [ "$status" = 0 ] || failed=1
    rm -f "$out/stage.txt"
}

{
    printf '# layerskip on %s, %s\n\n' "$device" "$(date -u +%Y-%m-%d)"
    layerskip --version
    python -c 'import torch, transformers
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
for number in range(torch.cuda.device_count()):
    found = torch.cuda.get_device_properties(number)
    print(f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}")'
    echo
} >"$report"

on=(--device "$device")
if [ "$device" != cpu ]; then
    stage 'Tests that need a GPU' bash -c 'cd "$1" && pytest -m cuda -rs --no-header tests' - "$here"
fi
for dtype in fp32 bf16; do
    stage "Decoding in $dtype, compared with transformers" layerskip bench --model "$model" "${on[@]}" --dtype "$dtype" \
        --samples "$samples" --repeats "$repeats" --baselines transformers,assistant-early-exit,no-reuse --format markdown
done
if [ "$device" != cpu ]; then
    stage 'The same without CUDA graphs' env LAYERSKIP_CUDA_GRAPHS=off layerskip bench --model "$model" "${on[@]}" --dtype bf16 \
        --samples "$samples" --repeats "$repeats" --format markdown
fi
stage 'Every exit and draft length' layerskip sweep-exits --model "$model" "${on[@]}" --samples "$samples" --format markdown
stage 'Batches of 1, 4 and 16' bash -c 'for size in 1 4 16; do
    layerskip data --samples "$1" | layerskip generate --jsonl --batch-size "$size" --model "$2" --device "$3" --stats 2>&1 >/dev/null |
        sed "s/^/    batch size $size: /"
done' - $((3 * samples)) "$model" "$device"
stage 'Speed of training by the recipe and without it' bash -c 'for dtype in fp32 bf16; do for recipe in finetune none; do
    layerskip finetune --recipe $recipe --model "$1" --device "$2" --dtype $dtype --steps 4 --output "$3" --overwrite 2>&1 |
        grep "tokens/s" | tail -n 1 | sed "s/^/    timed, $dtype, $recipe: /"
done; done' - "$base" "$device" "$out/timed"
stage 'Training by the recipe' bash -c 'layerskip finetune --recipe finetune --model "$1" --device "$2" --steps "$3" --output "$4" --overwrite 2>&1 |
    grep -E "tokens/s|loss by exit|^recipe |agree|^cost" | sed "s/^/    /"' - "$base" "$device" "$steps" "$out/recipe"
stage 'What it trained' layerskip bench --model "$out/recipe" "${on[@]}" --samples "$samples" --repeats "$repeats" --format markdown
stage 'Training of a drafter' bash -c 'layerskip train-drafter --model "$1" --device "$2" --steps "$3" --output "$4" --overwrite 2>&1 |
    grep -E "tokens/s|agree|parameters" | sed "s/^/    /"' - "$base" "$device" "$steps" "$out/drafter"
stage 'What it trained' layerskip bench --model "$out/drafter" "${on[@]}" --samples "$samples" --repeats "$repeats" --format markdown

echo "$report" >&2
exit "$failed"
