#!/usr/bin/env bash
# Super-resolution of the embedded shapes, 8 to 32 px, and a cascade from 8 px: data, latents and runs under --output, numbers in
# --output/*.json. Under an hour of one CPU core. Usage: bash scripts/recipes/upscale.sh --output DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
[ "${1:-}" = --output ] && [ $# = 2 ] || { echo "usage: $0 --output DIR" >&2; exit 2; }
out=$(absolute "$2")
cd "$project"

run scripts/make_shards.py pack shapes --samples 20000 --val-fraction 0.03 --output "$out/data"
run scripts/train_autoencoder.py --config identity --data "$out/data" --output "$out/pixels" --resume auto
run scripts/encode_latents.py --autoencoder "$out/pixels" --data "$out/data" --low-res 4 --output "$out/latents"
run scripts/train_denoiser.py --config upscale-shapes --latents "$out/latents" --output "$out/upscaler" --resume auto
run scripts/evaluate.py --overwrite --model "$out/upscaler" --data "$out/data" --upscale --count 256 --samples 8 --obedience shapes --grid "$out/upscaled.png" --output "$out/upscaler.json"

# The first stage of a cascade: the same scenes at 8 px, drawn from captions alone.
run scripts/make_shards.py pack "$out/data/train-{000000..000009}.tar" --splits draw --resolution 8 --output "$out/data-8"
run scripts/train_autoencoder.py --config identity --data "$out/data-8" --output "$out/pixels-8" --resume auto
run scripts/encode_latents.py --autoencoder "$out/pixels-8" --data "$out/data-8" --output "$out/latents-8"
run scripts/train_denoiser.py --config shapes --latents "$out/latents-8" --output "$out/base" --backbone.channels 32,64 --backbone.groups 8 \
    --backbone.query_position false --optimizer.matrices adamw --optimizer.lr 1.5e-3 --max-steps 4000 --resume auto
run scripts/generate.py --cascade "$out/base" --cascade "$out/upscaler" --prompt "a red circle at the top left and a blue square at the bottom right" --num-images 8 --output "$out/cascade" --overwrite
