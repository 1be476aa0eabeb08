#!/usr/bin/env bash
# The whole path on an embedded captioned data set: pack, train an autoencoder, encode, train a denoiser, draw, judge.
# About 12 minutes on two quiet CPU cores after installation. Usage: bash scripts/quickstart.sh [--output DIR]
set -euo pipefail
usage="usage: bash $0 [--output DIR]"
case $#:${1:-}:${2:-} in
    0:*) out= ;;
    2:--output:/*) out=$2 ;;
    2:--output:[!-]*) out=$PWD/$2 ;;
    *:--output:*) echo "error: --output takes one folder; $usage" >&2; exit 2 ;;
    *) echo "error: unknown argument $1; $usage" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
out=${out:-$project/runs/quickstart}
[ ! -e "$out/summary.json" ] || { echo "error: $out holds a finished quickstart; remove it, or give --output DIR" >&2; exit 2; }
cd "$project"
start=$SECONDS

run scripts/make_shards.py pack shapes --samples 20000 --val-fraction 0.02 --output "$out/data"
run scripts/train_autoencoder.py --config quickstart --data "$out/data" --output "$out/autoencoder" --resume auto
run scripts/encode_latents.py --autoencoder "$out/autoencoder" --data "$out/data" --output "$out/latents"
run scripts/train_denoiser.py --config quickstart --latents "$out/latents" --output "$out/denoiser" --resume auto
run scripts/evaluate.py --overwrite --model "$out/denoiser" --obedience shapes --count 200 --grid "$out/grid.png" --output "$out/evaluation.json"
run scripts/generate.py --model "$out/denoiser" --output "$out/pictures" --overwrite --num-images 2 \
    --prompt "a large red cross in the top left on a white background" --prompt "a small blue triangle at the bottom" \
    --prompt "a green circle above a yellow square" --prompt "a pink square to the left of a blue triangle on a black background"

run scripts/summarize.py quickstart "$out" --seconds $((SECONDS - start))
