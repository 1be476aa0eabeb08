#!/usr/bin/env bash
# Fashion-MNIST, both stages, within an hour on two CPU cores: shards, latents and runs under --output, numbers in --output/*.json.
# Usage: bash scripts/recipes/fashion_mnist.sh --root FOLDER_OF_IDX_FILES --output DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
root_and_output FOLDER_OF_IDX_FILES "$@"
cd "$project"

run scripts/make_shards.py pack fashion-mnist --root "$root" --output "$out/data"
start=$SECONDS
run scripts/train_autoencoder.py --config fashion --data "$out/data" --output "$out/autoencoder" --resume auto
run scripts/encode_latents.py --autoencoder "$out/autoencoder" --data "$out/data" --output "$out/latents"
run scripts/train_denoiser.py --config fashion --latents "$out/latents" --output "$out/denoiser" --resume auto
echo "both stages: $((SECONDS - start)) s"

[ -e "$out/classifier/model.safetensors" ] || run scripts/train_classifier.py --data "$out/data" --output "$out/classifier"
run scripts/evaluate.py --overwrite --model "$out/autoencoder" --data "$out/data" --count 0 --crop 28 --features "$out/classifier" --output "$out/autoencoder.json"
run scripts/evaluate.py --overwrite --model "$out/denoiser" --data "$out/data" --count 3000 --features "$out/classifier" --obedience "$out/classifier" --output "$out/denoiser.json"
for class in t-shirt trouser pullover dress coat sandal shirt sneaker bag "ankle boot"; do
    case $class in [aeiou]*) echo "a photo of an $class" ;; *) echo "a photo of a $class" ;; esac
done > "$out/prompts.txt"
run scripts/generate.py --model "$out/denoiser" --prompts "$out/prompts.txt" --num-images 8 --output "$out/pictures" --overwrite
