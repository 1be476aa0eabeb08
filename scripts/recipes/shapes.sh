#!/usr/bin/env bash
# The embedded shapes at full length, in about two hours of one CPU core. Usage: bash scripts/recipes/shapes.sh --output DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
[ "${1:-}" = --output ] && [ $# = 2 ] || { echo "usage: $0 --output DIR" >&2; exit 2; }
out=$(absolute "$2")
cd "$project"

run scripts/make_shards.py pack shapes --samples 60000 --val-fraction 0.02 --output "$out/data"
start=$SECONDS
run scripts/train_autoencoder.py --config shapes --data "$out/data" --output "$out/autoencoder" --resume auto
run scripts/encode_latents.py --autoencoder "$out/autoencoder" --data "$out/data" --output "$out/latents"
run scripts/train_denoiser.py --config shapes --latents "$out/latents" --output "$out/denoiser" --resume auto
echo "both stages: $((SECONDS - start)) s"
run scripts/evaluate.py --overwrite --model "$out/autoencoder" --data "$out/data" --count 0 --output "$out/autoencoder.json"
run scripts/evaluate.py --overwrite --model "$out/denoiser" --obedience shapes --count 1000 --grid "$out/grid.png" --output "$out/denoiser.json"
