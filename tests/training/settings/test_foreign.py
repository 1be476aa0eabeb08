"""Flags of other programs' scripts, and config keys without their section."""

from __future__ import annotations

import dataclasses

import hints
import pytest
import tiny

from training.settings import foreign
from training.settings.decoding import STAGES, sections
from training.settings.flags import ALIASES, TrainParser

DOORS = ("train_autoencoder", "train_denoiser", "generate", "make_shards", "encode_latents", "convert_autoencoder",
         "evaluate")  # fmt: skip
FLAGS = set().union(*map(hints.options, DOORS))
KEYS = {f"--{s}.{f.name}" for stage in STAGES for s, members in sections(stage).items() for m in members
        for f in dataclasses.fields(m)}  # fmt: skip
# Command lines of other programs, as people have them in their shell's history.
COMMANDS = {
    "diffusers": "--pretrained_model_name_or_path=x --dataset_name=y --use_ema --resolution=512 --center_crop"
    " --random_flip --train_batch_size=1 --gradient_accumulation_steps=4 --gradient_checkpointing"
    " --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler=constant"
    " --lr_warmup_steps=0 --output_dir=z --allow_tf32 --report_to=wandb --num_train_epochs 3"
    " --enable_xformers_memory_efficient_attention --snr_gamma 5"
    " --train_data_dir d --seed 3 --mixed_precision bf16 --validation_epochs 5 --push_to_hub --noise_offset 0.1",
    "kohya": "--train_data_dir d --network_module lora --network_dim 8 --optimizer_type AdamW8bit --max_train_epochs 3"
    " --save_every_n_epochs 1 --cache_latents --xformers --clip_skip 2 --min_snr_gamma 5 --enable_bucket --flip_aug"
    " --caption_extension .txt --shuffle_caption --keep_tokens 1 --save_precision fp16 --max_data_loader_n_workers 4",
    "dreambooth": "--instance_data_dir d --instance_prompt sks --class_data_dir c --class_prompt dog --rank 4"
    " --with_prior_preservation --prior_loss_weight 1.0 --num_class_images 200 --placeholder_token x"
    " --initializer_token dog --learnable_property object",
    "compvis": "--base x.yaml -t --gpus 0, --logdir logs --scale_lr False --ckpt x.ckpt",
    "dit": "--data-path d --image-size 256 --global-batch-size 256 --epochs 1400 --ckpt-every 5000 --vae ema"
    " --num-classes 9",
}  # fmt: skip
KNOWN = {"-t"}  # of which nothing can be said


@pytest.mark.parametrize("program", COMMANDS)
def test_a_command_of_another_program_is_answered_flag_by_flag(program: str) -> None:
    words = COMMANDS[program].split()
    problem = tiny.refused("train_denoiser", *words)
    assert problem.code == 2 and problem.what.startswith("unrecognized arguments:\n       ")
    told = {line.split(";")[0].strip(): line for line in problem.what.splitlines()[1:]}
    known = {"--seed", "--lr-scheduler", "--mixed-precision", "--gradient-accumulation-steps"}
    for word in (word.partition("=")[0] for word in words if word.startswith("-")):
        name = "--" + word.lstrip("-").replace("_", "-")
        ours = f"--{ALIASES.get(name[2:], name[2:])}" in hints.options("train_denoiser")
        assert (word in told) != ours and (word in KNOWN or ours or "; " in told[word]), word
        assert not ours or name in known or name[2:] in ALIASES or name in FLAGS


@pytest.mark.parametrize("meaning", foreign.MEANINGS)
def test_what_stands_for_a_foreign_flag_is_there(meaning: str) -> None:
    allowed = FLAGS | KEYS | {"--nproc-per-node"}
    assert [flag for flag in hints.FLAG.findall(meaning) if flag not in allowed] == []
    for script, verb in hints.COMMAND.findall(meaning):
        assert script in DOORS and (not verb or verb.strip() in hints.verbs(script))


def test_no_foreign_flag_is_one_of_training() -> None:
    """Else it would never be answered: it is spelled as ours, or as an alias."""
    ours = {flag[2:] for flag in hints.options("train_autoencoder") & hints.options("generate")} | set(ALIASES)
    assert foreign.HERE.keys() & ours == set()
    listed = [flag for flags in foreign.MEANINGS.values() for flag in flags.split()]
    assert sorted(listed) == sorted(set(listed)) and all("_" not in flag for flag in listed)


@pytest.mark.parametrize("stage", STAGES)
def test_the_keys_of_a_section_are_read_without_importing_it(stage: str) -> None:
    for section, members in sections(stage).items():
        if section != "format":
            fields = {field.name for member in members for field in dataclasses.fields(member)}
            assert foreign.keys(section) >= fields and len(foreign.keys(section) - fields) <= 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--log-every 5", "--log-every; did you mean '--train.log_every'?"),
        ("--log_every=5", "--log_every; did you mean '--train.log_every'?"),
        ("--gradient-checkpointing", "did you mean '--backbone.gradient_checkpointing'?"),
        ("--width 3", "is it --backbone.width, --text.width, --schedule.width?"),
        ("--log-with x", "; here: --report-to tensorboard,wandb; metrics.jsonl is always in the run folder"),
        ("--max-stps 5", "--max-stps; did you mean '--max-steps'?"),
        ("--rank 8", "--rank; did you mean '--adapter.rank'?"),
        ("--network_dim 8", "upon a run: --base RUN --config lora, with --adapter.rank R and --adapter.alpha A"),
        ("--frobnicate", "unrecognized argument: --frobnicate"),
    ],
)
def test_one_unknown_flag(words: str, expected: str) -> None:
    problem = tiny.refused("train_denoiser", *words.split())
    assert problem.what.startswith("unrecognized argument: --") and problem.what.endswith(expected)


def test_drawing_takes_keys_of_its_own_sections() -> None:
    problem = tiny.refused("generate", "--eta", "1", "--ddim_steps", "50", "--outdir", "x", "--warmup", "3")
    told = problem.what.splitlines()[1:]
    assert "'--sampler.eta'" in told[0] and "here: --steps N" in told[1] and "--output DIR" in told[2]
    assert "--optimizer" not in told[3]


def test_hyphens_in_a_key_are_underscores() -> None:
    parser = TrainParser("", "denoiser")
    for word in ("--train.log-every", "--train.log_every"):
        assert parser.read_training(["--print-config", word, "5"]).overrides == {"train.log_every": "5"}
