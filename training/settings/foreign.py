"""Flags of other programs' scripts (diffusers, kohya's, CompVis', DiT, transformers) and what they are here. And config
keys given as a flag without their section."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

PACK = "pictures are packed first: make_shards pack FOLDER --output DIR"
SIZE = "pictures have the size they were packed with: make_shards pack --resolution N"
ENLARGED = "pictures become as many times larger as the model was trained to make them (image.factor)"
WEIGHTS = "begin with the weights of a run: --init-from RUN; autoencoders: convert_autoencoder import"
EMA = "averaged weights are always kept: --train.ema 0.999 (0 = off)"
ADAM = "AdamW: --optimizer.betas 0.9,0.99"
BOARD = "--report-to tensorboard,wandb; metrics.jsonl is always in the run folder"
PRECISION = "--mixed-precision bf16 or fp16"
PROCESSES = "start with torchrun --nproc-per-node N, or accelerate launch"
STEPS = "trainings are counted in steps: --max-steps N"
LATENTS = "latents and embeddings are made beforehand: encode_latents"
CUTS = "pictures are cut when packed: make_shards pack --crop"
CAPTIONS = "captions are found when packed: make_shards pack --help"
ATTENTION = "torch's own attention is always used; leave it out"
TEXT_LEARNS = "the text encoder learns with --text.kind scratch, and is frozen with --text.kind huggingface"
LORA = "a LoRA is learned upon a run: --base RUN --config lora, with --adapter.rank R and --adapter.alpha A"
PRIOR = "pictures that the base draws are trained on beside: --base RUN --config dreambooth --prior.captions TEXT"
WORDS = "a word is learned upon a run: --base RUN --config textual-inversion --adapter.words WORD --adapter.kin WORD"
LOGGING = "--train.log_every N"
PICTURES = "pictures are drawn every --sample-every steps from held-out captions"
PLACE = "give it as --output DIR"
SAVED = "safetensors in float32 is always written; leave it out"
CONTROL = (
    "a control is learned with train_denoiser --base RUN --config controlnet, measured with evaluate --adapter CONTROL "
    "--hints, and drawn by with generate --control CONTROL --hint FILE"
)
NOT_HERE = "there is no such thing here"

MEANINGS = {  # what it is here -> the flags of other programs
    PACK: (
        "train-data-dir dataset-name dataset-config-name instance-data-dir data-path data-dir train-data-meta "
        "dataset-config in-json data-root"
    ),
    CAPTIONS: (
        "caption-column image-column caption-extension caption-separator shuffle-caption keep-tokens "
        "instance-prompt caption-dropout-every-n-epochs caption-tag-dropout-rate"
    ),
    SIZE: (
        "resolution image-size size train-image-size img-size enable-bucket bucket-reso-steps min-bucket-reso "
        "max-bucket-reso bucket-no-upscale"
    ),
    CUTS: "center-crop random-crop face-crop-aug-range image-interpolation-mode",
    "mirrored pictures: --train.flip true; latents: encode_latents --flip": "random-flip flip-aug no-hflip hflip",
    WEIGHTS: (
        "pretrained-model-name-or-path pretrained-vae-model-name-or-path pretrained-model vae ckpt finetune-from "
        "actual-resume network-weights vae-path unet checkpoint-path ckpt-path"
    ),
    EMA: "use-ema ema-decay offload-ema foreach-ema ema-inv-gamma ema-power ema-max-decay use-ema-warmup",
    ADAM: (
        "adam-beta1 adam-beta2 adam-epsilon optimizer-type optimizer-args use-8bit-adam optim opt use-adafactor "
        "fused-optimizer"
    ),
    "--adam-weight-decay X": "weight-decay wd",
    BOARD: (
        "logging-dir tracker-project-name log-with log-prefix wandb-run-name wandb wandb-project "
        "log-tracker-name log-dir"
    ),
    PRECISION: "bf16 fp16 full-bf16 full-fp16 use-fp16 precision amp",
    PROCESSES: (
        "local-rank gpus num-processes num-gpus num-nodes nproc-per-node multi-gpu deepspeed fsdp accelerator "
        "strategy"
    ),
    STEPS: "num-train-epochs max-train-epochs epochs num-epochs max-epochs train-steps",
    "the batch over all processes is --batch-size N": "global-batch-size total-batch-size effective-batch-size",
    "the batch of one process is --micro-batch-size N": "per-device-train-batch-size batch-size-per-gpu bs",
    LATENTS: (
        "cache-latents cache-latents-to-disk cache-text-encoder-outputs text-encoder-batch-size vae-batch-size "
        "cache-text-encoder-outputs-to-disk precompute-latents cache-info"
    ),
    ATTENTION: "enable-xformers-memory-efficient-attention xformers sdpa mem-eff-attn flash-attn",
    "--train.tf32 true; --mixed-precision bf16 is faster still": "allow-tf32 tf32",
    "less memory, more time: --backbone.gradient_checkpointing true, stage one --model.gradient_checkpointing true": (
        "gradient-checkpointing use-checkpoint grad-checkpointing activation-checkpointing"
    ),
    TEXT_LEARNS: (
        "train-text-encoder text-encoder-lr unet-lr stop-text-encoder-training train-unet-only "
        "network-train-unet-only clip-skip learning-rate-te"
    ),
    LORA: "network-module network-dim network-alpha network-args lora-rank use-lora lora-alpha r",
    PRIOR: "with-prior-preservation class-prompt class-data-dir",
    "--prior.weight W, of --config dreambooth": "prior-loss-weight",
    "--prior.count N, of --config dreambooth": "num-class-images",
    WORDS: "placeholder-token initializer-token num-vectors learnable-property",
    LOGGING: "logging-steps log-interval print-freq log-steps log-freq",
    "--save-every N": (
        "save-steps save-every-n-steps ckpt-every save-interval save-every-n-epochs save-freq every-n-train-steps"
    ),
    "--keep-last N": "save-total-limit save-last-n-steps save-last-n-epochs",
    "--sample-every N": (
        "eval-steps sample-every-n-steps validation-epochs sample-every-n-epochs eval-interval eval-every "
        "validation-every"
    ),
    PICTURES: "validation-prompts validation-prompt num-validation-images sample-prompts sample-sampler",
    "--train.validation_size N": "max-eval-samples num-eval-samples",
    PLACE: "results-dir logdir outdir output-name save-dir exp-dir run-dir project-dir out out-dir save-path",
    SAVED: "save-precision save-model-as no-safetensors variant use-safetensors safe-serialization",
    "--seed N": "global-seed random-seed manual-seed",
    "--num-workers N": "max-data-loader-n-workers workers persistent-data-loader-workers n-workers",
    "--lr-warmup-steps N, in steps": "warmup-steps warmup-ratio warmup lr-warmup",
    "the end of the decay, as a share of --lr: --optimizer.final_lr 0.1": "min-lr lr-min lr-end",
    "--lr-scheduler constant, cosine or linear": (
        "lr-scheduler-type lr-scheduler-num-cycles lr-num-cycles lr-power lr-scheduler-power scheduler "
        "lr-schedule"
    ),
    "give the rate for the whole batch: --lr X": "scale-lr base-lr base-learning-rate blr",
    "--weighting.kind min-snr": "snr-gamma min-snr-gamma debiased-estimation-loss",
    "--prediction.kind v, eps, x0 or velocity": "prediction-type v-parameterization predict-xstart v2",
    "--schedule.zero_terminal_snr true": "zero-terminal-snr rescale-betas-zero-snr",
    "--backbone.learned_variance true": "learn-sigma",
    "--times.kind logit-normal, with --times.mean and --times.std": (
        "weighting-scheme logit-mean logit-std timestep-sampling mode-scale discrete-flow-shift"
    ),
    "the share of captions dropped: --conditioning.dropout 0.1": (
        "proportion-empty-prompts cond-drop-prob caption-dropout-rate class-dropout-prob cfg-dropout"
    ),
    "no such noise; --times.stratified true evens the noise levels": (
        "noise-offset input-perturbation ip-noise-gamma multires-noise-iterations adaptive-noise-scale"
    ),
    "--config NAME|FILE": "base config-file config-path",
    "--resume auto": "resume-from continue auto-resume resume-path",
    "stage one's losses: --loss.perceptual, --loss.kl, --loss.adversarial": (
        "loss-type huber-c perceptual-weight kl-weight disc-weight lpips-scale kl-scale"
    ),
    "--loss.discriminator_start N and --loss.adversarial_start N": "disc-start discriminator-iter-start",
    "classes are captions: one word each": "num-classes class-label class-labels label-dim",
    "--steps N": "num-inference-steps ddim-steps inference-steps num-sampling-steps n-steps sampling-steps",
    "--guidance-scale W": "scale cfg-scale cfg w",
    "--sampler ddim --sampler.eta X": "ddim-eta eta",
    "--sampler NAME": "plms dpm-solver dpm klms sampler-name",
    "--size HxW": "height width image-height image-width W H",
    "--num-images N": "n-samples n-iter num-samples num-images-per-prompt n-images images-per-prompt",
    "--prompts FILE": "from-file prompt-file prompts-file",
    "generate from a run's folder: --model RUN": "model-path model-id model-name",
    CONTROL: "control controlnet controlnet-model-name-or-path",
    NOT_HERE: (
        "push-to-hub hub-token hub-model-id revision max-train-samples lowram max-token-length highvram no-half-vae "
        "color-aug skip-grid skip-save"
    ),
}
HERE = {flag: meaning for meaning, flags in MEANINGS.items() for flag in flags.split()}
# Where the keys of a section stand, besides the families of settings/families.py.
PLACES = {
    "model": ("autoencoder", "kl.py vq.py dc.py tiny.py"),
    "discriminator": ("autoencoder", "discriminator.py"),
    "latent": ("autoencoder", "regularisers.py"),
    "backbone": ("ldm", "backbones"),
    "text": ("ldm", "text"),
    "objective": ("ldm", "objectives"),
    "student": ("ldm", "students"),
}
SECTIONS = {
    "autoencoder": "model loss latent discriminator optimizer train",
    "denoiser": "backbone text conditioning schedule prediction times weighting pairing objective student adapter "
    "prior image optimizer train sample sampler grid guidance",
    "sampling": "sampler grid guidance",
}


def meaning(flag: str, verb: str) -> str:
    """What another program's flag is here, at the door of a verb, its name spelled with hyphens and without dashes;
    else empty."""
    here = HERE.get(flag, "")
    return ENLARGED if (here, verb) == (SIZE, "upscale") else here


def keys_named(name: str, part: str) -> list[str]:
    """The config keys `section.name` of a stage, or of what drawing takes ("sampling")."""
    return [f"{section}.{name}" for section in SECTIONS.get(part, "").split() if name in keys(section)]


def keys(section: str) -> set[str]:
    """The names of a section's keys, over all its kinds, read from their files without importing torch."""
    from training.settings import sections
    from training.settings.families import FAMILIES

    if plain := getattr(sections, section.capitalize(), None):
        return set(plain.__dataclass_fields__)
    package, names = PLACES.get(section, ("ldm", ""))
    classes: dict[str, ast.ClassDef] = {}
    for name in (names or FAMILIES[section][0]).split():
        place = _folder(package) / name
        for file in place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            nodes = ast.parse(file.read_text("utf-8")).body
            classes |= {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    chosen = [node for node in classes.values() if "kind" in _fields(node) or node.name == section.capitalize()]
    for node in chosen:  # and what they inherit, which grows the list
        chosen += [classes[base] for base in map(ast.unparse, node.bases) if base in classes]
    return {field for node in chosen for field in _fields(node)}


def _folder(package: str) -> Path:
    spec = find_spec(package)  # which imports nothing, as resources.files would: of ours, some need torch
    return Path(((spec and spec.submodule_search_locations) or ["."])[0])


def _fields(node: ast.ClassDef) -> set[str]:
    """The annotated names of a class that are no class variables."""
    own = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    return {ast.unparse(part.target) for part in own if "ClassVar" not in ast.unparse(part.annotation)}
