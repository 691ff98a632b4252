#!/usr/bin/env bash
# Sets up an environment, then the main job on the embedded default: convert, sweep, generate. No network after the installation.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh '' # no extras: sourced without it, it would take this script's arguments
model=${1:-layerskip-model}

echo "1/3 finetune: the recipe on the embedded base model" >&2
layerskip finetune --pmax 0.1 --escale 0.3 --exit-weights uniform --rotation 4 --lr 1.5e-3 --output "$model" --overwrite
echo "2/3 sweep-exits: where to exit, and how far to draft" >&2
layerskip sweep-exits --model "$model" --save
echo "3/3 generate: with the setting that the sweep recommends" >&2
printf 'remind me to call mom at 5' | layerskip generate --model "$model" --stats
