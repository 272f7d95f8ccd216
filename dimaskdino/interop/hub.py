"""Models on the Hugging Face Hub, through `huggingface_hub` (the extra `hub`)."""

import re
from pathlib import Path
from types import ModuleType

from dimaskdino.utils.errors import UserError, first_line

FILES = ["model.safetensors", "config.json", "layers.json", "README.md"]


def is_hub_id(source: str) -> bool:
    """Whether a text has the form `owner/name`, optionally with `@revision`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None and not source.startswith(".")


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("the Hugging Face Hub needs huggingface_hub: pip install 'dimaskdino[hub]'") from None
    return huggingface_hub


def download(hub_id: str) -> Path:
    """Download a model from the hub, or find it in the local cache.

    Args:
        hub_id: `owner/name`, optionally with `@revision`.

    Returns:
        The folder with the model's files.

    Raises:
        UserError: `huggingface_hub` is missing, or the model can neither be downloaded nor found in the cache.
    """
    hub = _huggingface_hub()
    name, _, revision = hub_id.partition("@")
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=FILES))
    except (OSError, ValueError, RuntimeError) as error:  # huggingface_hub's errors are all of these
        raise UserError(
            f"'{hub_id}' is not a local path and cannot be downloaded from the hub: {first_line(error)}"
        ) from None


def upload(folder: Path, hub_id: str, private: bool) -> str:
    """Upload a folder that `Model.save` wrote; the repository is created if it does not exist.

    Returns:
        The address of the commit.

    Raises:
        UserError: `huggingface_hub` is missing, nobody is logged in, or the upload failed.
    """
    hub = _huggingface_hub()
    try:
        api = hub.HfApi()
        api.create_repo(hub_id, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=hub_id, allow_patterns=FILES))
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"cannot upload to '{hub_id}': {reason}. Log in with 'hf auth login' first") from None
