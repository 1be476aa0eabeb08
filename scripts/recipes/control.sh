#!/usr/bin/env bash
# Control by edges of the embedded shapes, upon the model of the package; and, with --emoji, by silhouettes of emoji.
# --steps: of the edges; 30,000 are an hour and a half of one core, 3,000 ten minutes of rougher ones.
# --emoji: the folder that emoji.sh filled, with its --root and --text-encoder.
# Usage: bash scripts/recipes/control.sh --output DIR [--steps N] [--emoji DIR --root DIR --text-encoder DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
out= steps=30000 emoji= root= text=
while [ $# -gt 0 ]; do
    case $1 in
        --output) out=$(absolute "$2"); shift 2 ;;
        --steps) steps=$2; shift 2 ;;
        --emoji) emoji=$(absolute "$2"); shift 2 ;;
        --root) root=$(absolute "$2"); shift 2 ;;
        --text-encoder) text=$(absolute "$2"); shift 2 ;;
        *) echo "error: unknown argument $1; see the head of $0" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "error: --output is needed; see the head of $0" >&2; exit 2; }
cd "$project"

# measured DIR BASE WEIGHT GUIDANCE COUNT FLAGS...: with the control, and without
measured() {
    local place=$1 base=$2 weight=$3 guidance=$4 count=$5
    shift 5
    run scripts/evaluate.py --overwrite --model "$base" --adapter "$place/controlnet:$weight" --hints --data "$place/data" \
        --count "$count" --batch-size 50 --guidance-scale "$guidance" --output "$place/with.json" "$@"
    run scripts/evaluate.py --overwrite --model "$base" --adapter "$place/controlnet:0" --hints --data "$place/data" \
        --count "$count" --batch-size 50 --output "$place/without.json" "$@"
}

run scripts/make_shards.py pack shapes --samples 120000 --val-fraction 0.01 --hint edges --output "$out/shapes/data"
run scripts/encode_latents.py --autoencoder demo --data "$out/shapes/data" --output "$out/shapes/latents"
run scripts/train_denoiser.py --base demo --config controlnet --latents "$out/shapes/latents" --output "$out/shapes/controlnet" --max-steps "$steps" --resume auto
measured "$out/shapes" demo 1.5 1 1000 --obedience shapes

[ -n "$emoji" ] || exit 0
run scripts/make_shards.py pack emoji --root "$root" --output "$out/emoji/data" --resolution 64 --val-fraction 0.05 --order source --hint mask
run scripts/encode_latents.py --autoencoder "$emoji/autoencoder" --data "$out/emoji/data" --output "$out/emoji/latents" --text-encoder "$text" --text-length 32
run scripts/train_denoiser.py --base "$emoji/unet" --config controlnet --latents "$out/emoji/latents" --output "$out/emoji/controlnet" --text-encoder "$text" --max-steps 800 --train.batch_size 32 --resume auto
measured "$out/emoji" "$emoji/unet" 1 1.5 100 --text-encoder "$text"
