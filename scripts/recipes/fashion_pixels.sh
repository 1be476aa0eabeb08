#!/usr/bin/env bash
# Fashion-MNIST in pixels, without an autoencoder: a prior for inverse problems, and a diffusion classifier. About 40 minutes
# of one CPU core; data, latents and runs under --output, numbers in --output/*.json.
# Usage: bash scripts/recipes/fashion_pixels.sh --root FOLDER_OF_IDX_FILES --output DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
root_and_output FOLDER_OF_IDX_FILES "$@"
cd "$project"

run scripts/make_shards.py pack fashion-mnist --root "$root" --channels 1 --output "$out/data"
run scripts/train_autoencoder.py --config identity --data "$out/data" --output "$out/pixels" --resume auto
run scripts/encode_latents.py --autoencoder "$out/pixels" --data "$out/data" --output "$out/latents"
run scripts/train_denoiser.py --config fashion-pixels --latents "$out/latents" --output "$out/denoiser" --resume auto

[ -e "$out/classifier/model.safetensors" ] || run scripts/train_classifier.py --data "$out/data" --output "$out/classifier"
run scripts/evaluate.py --overwrite --model "$out/denoiser" --data "$out/data" --count 1000 --features "$out/classifier" --obedience "$out/classifier" --output "$out/denoiser.json"
for class in t-shirt trouser pullover dress coat sandal shirt sneaker bag "ankle boot"; do
    case $class in [aeiou]*) echo "a photo of an $class" ;; *) echo "a photo of a $class" ;; esac
done > "$out/prompts.txt"
run scripts/generate.py --model "$out/denoiser" --prompts "$out/prompts.txt" --num-images 8 --output "$out/pictures" --overwrite
