#!/usr/bin/env bash
# Sets up an environment, then trains a block that drafts for the embedded model, sweeps its exits and generates text. Needs no
# network after the installation.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh '' # no extras; without an argument, the sourced file would see this script's
model=${1:-layerskip-model}

echo "1/3 finetune: leave the embedded base model as it is, and train a block that drafts for it" >&2
layerskip finetune --frozen --model embedded-base --exits 8 --output "$model" --overwrite
echo "2/3 sweep-exits: measure every exit and draft length, save the best" >&2
layerskip sweep-exits --model "$model" --save
echo "3/3 generate: decode with the saved setting" >&2
printf 'remind me to call mom at 5' | layerskip generate --model "$model" --stats
