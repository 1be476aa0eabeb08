#!/usr/bin/env bash
# Students of the model of the package, each by another method and of about ten minutes of two quiet cores, and what they draw
# in how many network calls. --methods: configs of configs/student/. --count: pictures of one, two and three objects each.
# Usage: bash scripts/recipes/few_steps.sh --output DIR [--methods "dmd progressive"] [--count N]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
out= methods="progressive consistency meanflow reflow dmd" count=300
while [ $# -gt 0 ]; do
    case $1 in
        --output) out=$(absolute "$2"); shift 2 ;;
        --methods) methods=$2; shift 2 ;;
        --count) count=$2; shift 2 ;;
        *) echo "error: unknown argument $1; see the head of $0" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "error: --output is needed; see the head of $0" >&2; exit 2; }
cd "$project"

run scripts/make_shards.py pack shapes --samples 60000 --val-fraction 0.02 --output "$out/data"
run scripts/encode_latents.py --autoencoder demo --data "$out/data" --output "$out/latents"
students=()
for method in $methods; do
    run scripts/distill_denoiser.py --teacher demo --config "$method" --latents "$out/latents" --output "$out/$method" --resume auto
    students+=("$method=$out/$method")
done
run scripts/compare_steps.py demo "${students[@]}" --obedience shapes --count "$count" --output "$out/comparison" --overwrite
