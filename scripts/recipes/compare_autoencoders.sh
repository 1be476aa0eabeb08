#!/usr/bin/env bash
# Stage one measured, in about 100 minutes of one CPU core: KL and VQ at two factors on two data sets, each with an equal short
# budget and judged by inspect_autoencoder.py with its probe; what the latent regularisers do, by the probe and by a full training;
# a start of the adversarial game that is held back beside one that is not. Writes DIR/table.md and the runs; finished runs are kept.
# --data: packed pictures, one set or more, such as the data/ folders of fashion_mnist.sh and emoji.sh; the first is also used for
# the regularisers and the start. Usage: bash scripts/recipes/compare_autoencoders.sh --output DIR --data DIR [--data DIR ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
out= data=()
while [ $# -gt 0 ]; do
    case $1 in
        --data) data+=("$(absolute "$2")"); shift 2 ;;
        --output) out=$(absolute "$2"); shift 2 ;;
        *) echo "error: unknown argument $1; see the head of $0" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] && [ ${#data[@]} -gt 0 ] || { echo "error: --output and --data are needed; see the head of $0" >&2; exit 2; }
cd "$project"

f4=(--model.channels "[16, 32, 64]") f8=(--model.channels "[16, 32, 64, 64]")
vq=(--model.kind vq --model.encoder_channels 16 --model.codes 1024 --model.normalize true --model.codebook_decay 0.99
    --model.revive_every 100 --loss.codebook 0.1)
steps=800 late=(--loss.discriminator_start 250 --loss.adversarial_start 400 --loss.adversarial_ramp 200 --loss.return_margin 1)

train() { # NAME DATA FLAGS: one autoencoder at $out/NAME
    run scripts/train_autoencoder.py --config fashion --batch-size 16 --max-steps $steps --sample-every 100 --save-every 100 \
        --data "$2" --output "$out/$1" --resume auto "${late[@]}" "${@:3}"
}
inspect() { # NAME DATA: its numbers and its probe's, at $out/NAME/inspection
    [ -e "$out/$1/inspection/inspection.json" ] || run scripts/inspect_autoencoder.py --overwrite "$out/$1" --data "$2" \
        --output "$out/$1/inspection" --lpips random --lpips-net squeeze --probe-steps 400 --probe-samples 512
}
full() { # NAME DATA: a denoiser trained on it, judged, at $out/NAME/denoiser.json
    run scripts/encode_latents.py --autoencoder "$out/$1" --data "$2" --output "$out/$1/latents"
    run scripts/train_denoiser.py --config fashion --latents "$out/$1/latents" --output "$out/$1/denoiser" --max-steps 1200 --resume auto
    [ -e "$out/$1/denoiser.json" ] || run scripts/evaluate.py --overwrite --model "$out/$1/denoiser" --data "$2" --count 1000 --output "$out/$1/denoiser.json"
}

first=${data[0]} name=$(basename "$(dirname "${data[0]}")")
train "$name-kl-f4" "$first" "${f4[@]}"; inspect "$name-kl-f4" "$first"
train "$name-equivariance" "$first" "${f4[@]}" --latent.kind equivariance --max-steps 1200; inspect "$name-equivariance" "$first" # as good by then
train "$name-spectral" "$first" "${f4[@]}" --latent.kind spectral; inspect "$name-spectral" "$first"
start=(--loss.adversarial 0.8 --discriminator.width 64 --discriminator.layers 3) # an adversary that can do harm
train "$name-start-held-back" "$first" "${f4[@]}" "${start[@]}"
train "$name-start-hard" "$first" "${f4[@]}" "${start[@]}" --loss.discriminator_start 400 --loss.adversarial_ramp 1 --loss.return_margin 0
for latents in kl-f4 equivariance spectral; do full "$name-$latents" "$first"; done

for set in "${data[@]}"; do
    name=$(basename "$(dirname "$set")")
    train "$name-kl-f4" "$set" "${f4[@]}"; inspect "$name-kl-f4" "$set"
    train "$name-kl-f8" "$set" "${f8[@]}"; inspect "$name-kl-f8" "$set"
    train "$name-vq-f4" "$set" "${f4[@]}" "${vq[@]}"; inspect "$name-vq-f4" "$set"
    train "$name-vq-f8" "$set" "${f8[@]}" "${vq[@]}"; inspect "$name-vq-f8" "$set"
done

"$PYTHON" scripts/summarize.py autoencoders "$out" | tee "$out/table.md"
