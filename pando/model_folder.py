"""Where a model's files are: a folder, the built-in checkpoint, or the Hugging Face hub.

Knows nothing of what the files hold. Whatever goes wrong is one `ConfigError` of one line, soon.
"""

from __future__ import annotations

import re
from pathlib import Path

from pando.errors import ConfigError

BUILTIN_MODEL = "pando-tiny"

_BUILTIN_FOLDER = Path(__file__).parent / "builtin"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_WANTED = ("*.json", "*.safetensors", "chat_template.jinja")
# Folders hold other formats, and some publishers add their own unsharded copy of the weights.
_UNWANTED = ("*/*", "consolidated*.safetensors")
_HUB_TIMEOUT_S = 5.0


def resolve_model(name: str) -> Path:
    """The folder with `config.json` of the model that `name` names.

    `pando-tiny` is the built-in checkpoint; an existing folder is taken as it is; anything else of the form
    `owner/name` is downloaded from the hub, or found in its local cache where the hub cannot be reached.
    Raises `ConfigError`. The hub is given 5 seconds to answer; a download that breaks off is tried again by the hub's
    client for less than two minutes.
    """
    if not name:
        raise ConfigError("no model given")
    if name == BUILTIN_MODEL:
        return _checked(_BUILTIN_FOLDER / BUILTIN_MODEL, "the built-in model is not part of this installation")
    try:
        path = Path(name).expanduser()
        found = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"the model name {name!r} is no path and no hub id") from error
    if found:
        return _checked(path.resolve(), f"the model folder {name} has no config.json")
    if _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name:
        return _download(name)
    raise ConfigError(f"no model folder {name}")


def _checked(folder: Path, otherwise: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ConfigError(otherwise if folder.is_dir() or not folder.exists() else f"{folder} is no model folder")
    return folder


def _download(hub_id: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(f"no model folder {hub_id}; to get it from the hub, install huggingface-hub") from error
    offline = _why_offline(hub_id)
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
            etag_timeout=_HUB_TIMEOUT_S,
            local_files_only=bool(offline),
        )
    except Exception as error:  # the hub's client raises errors of many libraries and of its own
        why = offline or f"its download failed ({type(error).__name__})"
        raise ConfigError(f"no model folder {hub_id}, no copy in the hub's cache, and {why}") from error
    return _checked(Path(folder), f"{hub_id} on the hub has no config.json")


def _why_offline(hub_id: str) -> str:
    """Empty if the hub knows the model; else the reason, from one request without the client's retries.

    Raises `ConfigError` where the hub answers that the model is not there for us.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().model_info(hub_id, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise ConfigError(f"the hub gives {hub_id} only to those it has granted access; set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"no model folder {hub_id}, and the hub has none of that name for this HF_TOKEN") from error
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # noqa: BLE001 - see above: all else means that the hub does not serve us now
        return f"the hub cannot be reached ({type(error).__name__})"
    return ""
