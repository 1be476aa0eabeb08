"""The work of `publish`: a finished model, checked whole and without anything else, onto the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands import door
from training.errors import CHECKPOINT, PACKAGE, UserError
from training.messages import answer, note, tell
from training.models.adapters import is_adapter, stored_base
from training.models.assembly import load_pipeline
from training.models.autoencoders import load_autoencoder
from training.models.cards import FACTS, SAMPLES, stored_facts
from training.models.folders import Found, find, name_of
from training.next_step import again, beside, prompt, tell_next
from training.settings.embedded import HUB
from training.tensors import content_hash, load_tensors, stored_hash

if TYPE_CHECKING:
    import argparse

# What a model folder may hold: weights as safetensors, all else as text, by the names that are written here. No pickle,
# no optimiser's state, nothing that a user has put there.
OURS = re.compile(
    r"(README\.md|(config|card|ingredients|teacher|base|hint)\.json|model\.safetensors|(samples|hint)\.png)"
    r"|autoencoder/(README\.md|(config|card|teacher)\.json|model\.safetensors)"
    r"|text_encoder/(model(-\d+-of-\d+)?\.safetensors|[\w.-]+\.json)"
    r"|tokenizer/[\w-]+\.(json|txt|model)"
)
TEXTS = (".json", ".md", ".txt")
WHY = {
    401: ("the hub does not know this token", "log in again: hf auth login"),
    403: ("this token may not write there", "give the name of a user or organisation of yours, or a token that writes"),
    404: ("there is no such place, or this token may not see it", "look up the name and the revision"),
}


def publish(args: argparse.Namespace) -> None:
    """Check, list and send a model.

    Raises UserError for a name that is none, a model that is not whole or not finished, a file that is none of ours,
    and where the hub cannot be reached or refuses; nothing is sent then.
    """
    check_name(args.repo)
    found = find(args.model)
    if not found.finished:
        hint = f"wait for its end, or take what this makes: {door('export_model', args.model, '--output', 'DIR')}"
        raise UserError(f"{args.model} is not finished", hint=hint, code=CHECKPOINT)
    paths = contents(found.home)
    check_whole(found, args.text_encoder)
    for path in paths:
        answer(f"{path.stat().st_size:>14,}  {path.relative_to(found.home).as_posix()}")
    answer(f"{sum(path.stat().st_size for path in paths):>14,}  bytes in {len(paths)} files, for {args.repo}")
    if found.stage == "autoencoder" and found.home / SAMPLES in paths:
        note(f"{SAMPLES} shows held-out pictures of the data")
    if not (found.home / FACTS).is_file():
        note("its model card is of an earlier version; export_model writes one that the hub reads")
    if args.dry_run:
        tell("nothing was sent")
        return
    check_reachable()
    answer(f"published: {send(args, found.home, paths)}")
    if found.stage == "denoiser" and not args.revision:
        captions = stored_facts(found.home).get("data", {}).get("captions", ["a caption"])
        where = ["--output", beside(args.model, "pictures"), *again({"text-encoder": args.text_encoder})]
        model = ["--model", f"{HUB}{args.repo}"]
        if is_adapter(found.config()):
            model = ["--model", stored_base(found.home)["name"], "--adapter", f"{HUB}{args.repo}"]
        tell_next(door("generate", *model, *prompt(captions), *where))


def check_name(repo: str) -> None:
    """Raises UserError for what is no ORG/NAME."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
        if repo.count("/") == 1:
            return
        why = "it names no user or organisation"
    except ValueError:
        why = "letters, digits, '-', '_' and '.' alone, 96 at most, and neither '--' nor '..'"
    raise UserError(f"--repo {repo}: is no ORG/NAME of the hub ({why})", hint="as --repo my-name/my-model")


def contents(folder: Path) -> list[Path]:
    """The files of a model folder. Raises UserError for one that is none of ours, and for a path of this machine."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    others = [name for path in paths if not OURS.fullmatch(name := path.relative_to(folder).as_posix())]
    if others:
        what = f"{folder} holds what is no part of a model: {', '.join(others[:5])}{' ...' if others[5:] else ''}"
        raise UserError(what, hint="move it elsewhere", code=CHECKPOINT)
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder} has no README.md", hint="use another copy", code=CHECKPOINT)
    private = f"{Path.home()}/"
    for path in paths if Path.home() != Path("/") else ():  # in a container it may be; then it tells nothing
        if path.suffix in TEXTS and private in path.read_text("utf-8", "replace"):
            raise UserError(f"{path} names a folder of yours, {private}", hint="take it out of the file")
    return paths


def check_whole(found: Found, text_encoder: str | None) -> None:
    """Raises UserError where a part is missing, damaged, or another than the model was trained with."""
    if found.stage == "denoiser" and is_adapter(found.config()):
        now = content_hash(load_tensors(found.weights))
    elif found.stage == "denoiser":
        now = load_pipeline(found.home, "cpu", text_encoder).hashes["denoiser"]
    else:
        now = content_hash(load_autoencoder(found.home).state_dict())
    if (then := stored_hash(found.weights)) not in ("", now):
        what = f"{found.weights} is {now[:12]}, it was written as {then[:12]}"
        raise UserError(what, hint="use another copy", code=CHECKPOINT)


def check_reachable() -> None:
    """Raises UserError where the hub may not be asked, or not be written to."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        hint = "take HF_HUB_OFFLINE out of the environment; --dry-run needs no network"
        raise UserError("HF_HUB_OFFLINE is set: nothing is sent", hint=hint)
    if not get_token():
        hint = "hf auth login, or set HF_TOKEN; --dry-run needs none"
        raise UserError("there is no token of the Hugging Face hub", hint=hint)


def send(args: argparse.Namespace, folder: Path, paths: list[Path]) -> str:
    """One commit of the `paths` of `folder`; its address. Raises UserError where the hub refuses or is not there."""
    from huggingface_hub import HfApi

    api, names = HfApi(library_name=PACKAGE), [path.relative_to(folder).as_posix() for path in paths]
    message = args.message or f"{name_of(folder)}, by {PACKAGE}"
    try:
        api.create_repo(args.repo, private=args.private or None, exist_ok=True)
        public = args.private and not api.repo_info(args.repo).private
        if not public:
            if args.revision:
                api.create_branch(args.repo, branch=args.revision, exist_ok=True)
            commit: Any = api.upload_folder(
                repo_id=args.repo, folder_path=folder, allow_patterns=names, revision=args.revision,
                commit_message=message,
            )  # fmt: skip
            return str(commit.commit_url)
    except Exception as failure:  # the hub has a class of its own for each; their texts may be long, and tell requests
        status = getattr(getattr(failure, "response", None), "status_code", 0)
        why, hint = WHY.get(status, ("is the hub reachable from here?", "try again; --dry-run needs no network"))
        raise UserError(f"{args.repo} was not written: {type(failure).__name__}; {why}", hint=hint) from None
    raise UserError(f"{args.repo} is there, and public", hint="leave --private out, or give another --repo")
