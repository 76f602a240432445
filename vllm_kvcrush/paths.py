"""Where vllm-kvcrush keeps files, and where models are. Imports neither vLLM nor torch."""

from __future__ import annotations

import os
from pathlib import Path


class ModelNotHere(ValueError):
    """A model is not on this machine; the message is one sentence for a user."""


def cache_root() -> Path | None:
    """Returns the directory for files that vllm-kvcrush makes: $VLLM_KVCRUSH_CACHE, else
    `vllm-kvcrush` under $XDG_CACHE_HOME, else under `.cache` of the user's home. Returns None for a
    user without a home: nothing is kept then unless a path is given."""
    if own := os.environ.get("VLLM_KVCRUSH_CACHE"):
        return expanded(own).absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return expanded(xdg).absolute() / "vllm-kvcrush"
    try:
        return Path.home() / ".cache" / "vllm-kvcrush"
    except RuntimeError:  # no $HOME, and no entry in the user database
        return None


def expanded(path: str | os.PathLike[str]) -> Path:
    """Returns the path with `~` replaced by the user's home, where there is one."""
    # Unlike Path.expanduser, which raises for a user without a home.
    return Path(os.path.expanduser(path))


def model_folder(model: str | os.PathLike[str]) -> Path:
    """Returns the directory of a model, given the directory, one of its files, or the model's name
    on the Hugging Face hub if it is in the local cache, where vLLM looks too. Downloads nothing.
    Raises ModelNotHere."""
    name = os.fspath(model)
    path = expanded(name)
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # no such package, not a name, not in the cache: whatever the hub may raise
        raise ModelNotHere(
            f"{name} is not here: give the directory of a model on this machine, or the name of "
            "one that `hf download` has put into the Hugging Face cache."
        ) from None
