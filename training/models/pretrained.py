"""Models of the transformers library, from a folder or by name: no code of theirs is run, no weight of theirs guessed.

For a folder nothing is asked of a network; what it names beyond itself (kernels, adapters, backbones) is not had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import DATA, UserError
from training.messages import rewrites, tell
from training.tensors import check_weights

FAILURES = (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError, RuntimeError)
NOT_SAVED = ("position_ids", "inv_freq")  # constants that older files store and newer ones do not


@contextmanager
def loading(what: str, name: str, hint: str) -> Iterator[dict[str, Any]]:
    """Inside, the arguments of every `from_pretrained` of `name`; what goes wrong becomes one sentence (code 3)."""
    from huggingface_hub import constants
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of the reading of weights
    folder = Path(name).is_dir()
    if name.startswith(("/", ".", "~")) and not folder:
        raise UserError(f"{name}: no such folder of a {what}", hint=hint, code=DATA)
    if not folder:
        tell_download(what, name)
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or folder
    try:
        if (Path(name) / "adapter_config.json").exists():
            raise ValueError("it is an adapter of another model")
        # Without an answer given here transformers would ask on the terminal whether to run a stranger's code.
        yield {"trust_remote_code": False, "local_files_only": folder}
    except (*FAILURES, SafetensorError) as why:
        reason = str(why).strip().splitlines()[0] if str(why).strip() else type(why).__name__
        raise UserError(f"{what} '{name}' cannot be loaded ({reason[:200]})", hint=hint, code=DATA) from None
    finally:
        constants.HF_HUB_OFFLINE = before


def tell_download(what: str, name: str) -> None:
    """Say that `name` may now be downloaded; the hub's own bars are for terminals alone."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    tell(f"{what} {name}: downloaded, as far as it is not on this machine")
    if not rewrites():
        disable_progress_bars()


def in_precision(dtype: str) -> dict[str, str]:
    """What transformers is told, to load weights as "float32", say, whatever they are stored as: version 5 would take
    the file's own, version 4 float32, and each encode otherwise. "auto" is the file's own."""
    from transformers import __version__

    return {"dtype" if tuple(map(int, __version__.split(".")[:2])) >= (4, 56) else "torch_dtype": dtype}


def load_model(name: str, families: Mapping[str, Any], how: Mapping[str, Any], dtype: str = "float32") -> Any:
    """The model of `name`, by its class or `model_type` one of `families`, else what AutoModel makes of it. Safetensors
    only; its weights as `dtype`, whatever precision they are stored in.

    Raises ValueError where its files lack weights, hold others or ones that are not finite. The first layer of all
    would be random, and nothing would tell.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(name, **how)
    _refuse_demands(config)
    own = (config.architectures or [""])[0]  # Stable Diffusion's CLIP is stored without its projection
    family = families.get(own) or families.get(config.model_type, AutoModel)
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True, **_variant(name)}  # refused below, by name
    model, report = family.from_pretrained(name, use_safetensors=True, **told, **how, **in_precision(dtype))
    _check_report(model, report)
    try:
        check_weights(state := model.state_dict(), state, "its weights")
    except UserError as problem:
        raise ValueError(problem.what) from None
    return model


def _variant(name: str) -> dict[str, str]:
    """The precision in the name of a folder's weights, where that is all it holds: model.fp16.safetensors."""
    if not Path(name).is_dir() or (Path(name) / "model.safetensors").exists():
        return {}
    files = [path for path in Path(name).glob("model.*.safetensors") if len(path.suffixes) == 2]
    return {"variant": files[0].suffixes[0].removeprefix(".")} if len(files) == 1 else {}


def _refuse_demands(config: Any) -> None:
    """Raises ValueError for a config that asks for code or layers from elsewhere."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        if "/" in str(getattr(part, "_attn_implementation", "")):
            raise ValueError("its config.json names code to be downloaded as attn_implementation")
        if getattr(part, "quantization_config", None):
            raise ValueError("its weights are quantised")


def _check_report(model: Any, report: Mapping[str, Any]) -> None:
    """Every weight of the model from its files, and none of these left over but those of another half or head."""
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):  # poolers are not used
        raise ValueError(f"its files lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    if mismatched := sorted(str(row[0] if isinstance(row, tuple) else row) for row in report["mismatched_keys"]):
        raise ValueError(f"its {mismatched[0]} is of another size than config.json says")
    own = {name for name, _ in model.named_children()}
    for key in sorted(report["unexpected_keys"]):
        inner = key.removeprefix(f"{model.base_model_prefix}.")
        if inner.partition(".")[0] in own and not inner.endswith(NOT_SAVED) and "pooler" not in inner:
            raise ValueError(f"its files hold {key}, which config.json has no place for")
