#!/usr/bin/env bash
# Scores of lm-evaluation-harness on tasks with local rows: through every exit, and compared with lm-eval's own hf model.
#     bash examples/lm_eval.sh MODEL FOLDER [EXIT [LIMIT]]    LIMIT: rows per task, 0: all
# Needs the extra lm-eval. MODEL is a folder with a transformers checkpoint; results go to FOLDER.
set -euo pipefail
model=$1 folder=$2 exit=${3:-25} limit=${4:-0}
here=$(dirname "$0")
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python "$here/lm_eval_tasks.py" "$folder/tasks"
layerskip sweep-exits --model "$model" --task lm-eval:facts_choice,facts_answer --include-path "$folder/tasks" --limit "$limit" \
    --batch-size 16 --timed 2 --dtype fp32 --output "$folder/curves" --overwrite
layerskip export "$model" --exit "$exit" --output "$folder/exit" --overwrite
python "$here/lm_eval_agreement.py" "$folder/tasks" "$limit" "layerskip:$model:fp32" "hf:$model:fp32"
python "$here/lm_eval_agreement.py" "$folder/tasks" "$limit" "layerskip:$model:fp32:$exit" "hf:$folder/exit:fp32"
