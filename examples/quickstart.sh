#!/usr/bin/env bash
# Sets up an environment, converts the embedded base model, sweeps its exits and generates text; offline after the installation.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh '' # without an argument, the sourced file would see this script's
model=${1:-layerskip-model}

exact_match() { # of 200 test rows at full depth, in percent
    layerskip bench --model "$1" --samples 200 --repeats 1 --strategies autoregressive --format json 2>/dev/null |
        python -c 'import json, sys; print("%.1f%%" % (100 * json.load(sys.stdin)["results"][0]["metrics"]["exact_match"]))'
}

echo "1/4 finetune: exits, trained together with the model" >&2
layerskip finetune --pmax 0.2 --output "$model" --overwrite
echo "2/4 sweep-exits: measure exits and draft lengths, save the best" >&2
layerskip sweep-exits --model "$model" --save
echo "3/4 generate: exit 8, 6 drafts" >&2
printf 'remind me to call mom at 5' | layerskip generate --model "$model" --exit 8 --spec 6 --stats
echo "4/4 generate: the saved setting" >&2
printf 'remind me to call mom at 5' | layerskip generate --model "$model" --stats
echo "exact match: $(exact_match embedded-base) before, $(exact_match "$model") after" >&2
