#!/usr/bin/env bash
# Control by edges of the embedded shapes, upon the model of the package; and, with --emoji, by silhouettes of emoji.
# --emoji: the folder that emoji.sh filled, with its --root and --text-encoder.
# Usage: bash scripts/recipes/control.sh --output DIR [--emoji DIR --root DIR --text-encoder DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
out= emoji= root= text=
while [ $# -gt 0 ]; do
    case $1 in
        --output) out=$(absolute "$2"); shift 2 ;;
        --emoji) emoji=$(absolute "$2"); shift 2 ;;
        --root) root=$(absolute "$2"); shift 2 ;;
        --text-encoder) text=$(absolute "$2"); shift 2 ;;
        *) echo "error: unknown argument $1; see the head of $0" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "error: --output is needed; see the head of $0" >&2; exit 2; }
cd "$project"

# measured DIR BASE FLAGS...: with the control, and without
measured() {
    local place=$1 base=$2
    shift 2
    for weight in 1 0; do
        run scripts/evaluate.py --overwrite --model "$base" --adapter "$place/controlnet:$weight" --hints --data "$place/data" \
            --count 300 --output "$place/weight-$weight.json" "$@"
    done
}

run scripts/make_shards.py pack shapes --samples 12000 --val-fraction 0.1 --hint edges --output "$out/shapes/data"
run scripts/encode_latents.py --autoencoder demo --data "$out/shapes/data" --output "$out/shapes/latents"
run scripts/train_denoiser.py --base demo --config controlnet --latents "$out/shapes/latents" --output "$out/shapes/controlnet" --resume auto
measured "$out/shapes" demo --obedience shapes

[ -n "$emoji" ] || exit 0
run scripts/make_shards.py pack emoji --root "$root" --output "$out/emoji/data" --resolution 64 --val-fraction 0.05 --order source --hint mask
run scripts/encode_latents.py --autoencoder "$emoji/autoencoder" --data "$out/emoji/data" --output "$out/emoji/latents" --text-encoder "$text" --text-length 32
run scripts/train_denoiser.py --base "$emoji/unet" --config controlnet --latents "$out/emoji/latents" --output "$out/emoji/controlnet" --text-encoder "$text" --resume auto
measured "$out/emoji" "$emoji/unet" --text-encoder "$text"
