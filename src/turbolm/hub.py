"""Find models and tokenizers by their name on the Hugging Face hub. Torch-free.

A value of `model.pretrained` or `tokenizer.path` that is not a path on this machine and looks like a hub name (`name`
or `owner/name`) names a repository of the hub. `fetch` downloads it into the local Hugging Face cache once, before any
rank starts; everything else only looks into that cache. Only safetensors and JSON are downloaded, never pickles or
code. A token comes from the environment (HF_TOKEN), never from a recipe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turbolm.errors import UserError
from turbolm.files import load_json
from turbolm.recipe.paths import use_path
from turbolm.recipe.schema import Model, Recipe, Tokenizer

DEFAULT_REVISION = "main"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_MAX_NAME_LENGTH = 96
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_PATTERNS = {
    "model": ["*.safetensors", "*.json", "*.jinja"],
    "tokenizer": [*_TOKENIZER],
    "settings": ["config.json", *_TOKENIZER],
}
# Other formats' folders (original/, onnx/), and a second copy of all weights under Mistral's names.
_IGNORED = ["*/*", "consolidated*"]

SectionName = Literal["model", "tokenizer", "settings"]


@dataclass(frozen=True)
class Origin:
    """Where a recipe takes a model or a tokenizer from: a path, or a hub name with a revision.

    `settings` is a model's configuration with its tokenizer, for `turbolm adapt`, which needs no weights.
    """

    section: SectionName
    value: str
    revision: str | None

    @property
    def key(self) -> str:
        """The recipe's key that names it, or adapt's argument."""
        return {"model": "model.pretrained", "tokenizer": "tokenizer.path", "settings": "MODEL"}[self.section]

    @property
    def is_on_hub(self) -> bool:
        """Whether the value is no path here and looks like a hub name."""
        name = self.value
        if os.path.lexists(name) or name.endswith((".json", ".git")) or ".." in name or "--" in name:
            return False
        return len(name) <= _MAX_NAME_LENGTH and _NAME.fullmatch(name) is not None

    @property
    def download_command(self) -> str:
        """The command for a user to run where there is a network."""
        return f"hf download {self.value} --revision {self.revision or DEFAULT_REVISION}"


def find_origins(recipe: Recipe) -> Iterator[Origin]:
    """Yield what the recipe starts from that the run does not make itself."""
    model, tokenizer = recipe.model, recipe.tokenizer
    if model.pretrained is not None:
        yield Origin("model", model.pretrained, model.revision)
    if tokenizer.path is not None:
        yield Origin("tokenizer", tokenizer.path, tokenizer.revision)


def check_revisions(recipe: Recipe) -> None:
    """Raise UserError for a revision beside a path, or an invalid one."""
    for origin in find_origins(recipe):
        _check_revision(origin)


def pretrained_folder(model: Model) -> Path:
    """Return the local folder of `model.pretrained`: its path, or its snapshot in the Hugging Face cache.

    A path need not exist. Raises UserError for a hub name that is not in the cache.
    """
    return _local(Origin("model", str(model.pretrained), model.revision))


def tokenizer_path(tokenizer: Tokenizer) -> Path:
    """Return the local folder or file of `tokenizer.path`. Raises UserError for a hub name that is not in the cache."""
    return _local(Origin("tokenizer", str(tokenizer.path), tokenizer.revision))


def cached_config(model: Model) -> Path | None:
    """Return the config.json of a hub name in `model.pretrained` if it is in the cache; the weights need not be."""
    origin = Origin("model", str(model.pretrained), model.revision)
    folder = _cached(origin) if origin.is_on_hub else None
    return folder / "config.json" if folder and (folder / "config.json").is_file() else None


def config_command(model: Model) -> str | None:
    """Return the command that fetches the config.json of a hub name in `model.pretrained`; None for a path."""
    origin = Origin("model", str(model.pretrained), model.revision)
    name = origin.value
    return origin.download_command.replace(name, f"{name} config.json", 1) if origin.is_on_hub else None


def fetch(origin: Origin) -> str:
    """Download what a hub name means unless the cache holds all of it; returns the commit.

    What the cache holds in full is used without asking the hub. Raises UserError.
    """
    return _fetch(origin).name


def fetch_settings(name: str) -> Path:
    """Return the snapshot of a hub name's configuration and tokenizer, without its weights. Raises UserError."""
    return _fetch(Origin("settings", name, None))


def _fetch(origin: Origin) -> Path:
    _check_revision(origin)
    folder = _cached(origin)
    if folder is None or not _is_whole(folder, origin):
        folder = _download(origin)
    missing = _missing(folder, origin)
    if missing is not None and (folder / "adapter_config.json").is_file():
        raise UserError(f"{origin.key}: {origin.value} is an adapter (PEFT), not a model; merge it first")
    if missing is not None:
        reasons = {
            "model": "only safetensors are read, because other formats can run code; convert it where you trust it",
            "tokenizer": "convert it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            "settings": "it is no model in the Hugging Face layout",
        }
        raise UserError(f"{origin.key}: {origin.value} at {folder.name} has no {missing}: {reasons[origin.section]}")
    return folder


def _local(origin: Origin) -> Path:
    _check_revision(origin)
    if not origin.is_on_hub:
        return use_path(origin.value, origin.key)
    folder = _cached(origin)
    if folder is None or _missing(folder, origin):
        raise _not_here(origin, "is not in the Hugging Face cache")
    return folder


def _check_revision(origin: Origin) -> None:
    """Raise UserError for a revision beside a path (ignoring it would train something else), or an invalid one."""
    if origin.revision is None:
        return
    key = f"{origin.section}.revision"
    if not origin.is_on_hub:
        what = "is a path on this machine" if os.path.lexists(origin.value) else "is no hub name"
        raise UserError(
            f"{key}: only a hub name has revisions, and {origin.key} {origin.value} {what}; remove one of the two"
        )
    if not _REVISION.fullmatch(origin.revision) or ".." in origin.revision:
        raise UserError(f"{key}: expected a branch, a tag or a commit, got {origin.revision!r}")


# ------------------------------------------------------------------------------------------------------- the cache


def _cached(origin: Origin) -> Path | None:
    """Return the snapshot that the cache has for a revision; it may lack files."""
    from huggingface_hub import snapshot_download

    try:  # no patterns: whatever files are there
        return Path(snapshot_download(origin.value, revision=origin.revision, allow_patterns=[], local_files_only=True))
    except (FileNotFoundError, ValueError):  # not there, or no valid name
        return None


def _missing(folder: Path, origin: Origin) -> str | None:
    """Return the first file that a snapshot lacks, or None. Files appear there when they are complete."""
    needed = "tokenizer.json" if origin.section == "tokenizer" else "config.json"
    if not (folder / needed).is_file():
        return needed
    if origin.section != "model" or (folder / _WEIGHTS).is_file():
        return None
    try:
        shards = sorted(set(load_json(folder / _INDEX)["weight_map"].values()))
    except OSError:
        return _WEIGHTS  # neither one file nor an index of several
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # loading says what is wrong with the index
    return next((name for name in shards if isinstance(name, str) and not (folder / name).is_file()), None)


def _is_whole(folder: Path, origin: Origin) -> bool:
    """Whether the hub need not be asked. A tokenizer without its settings would load with other special tokens."""
    settings = origin.section == "model" or (folder / "tokenizer_config.json").is_file()
    return settings and _missing(folder, origin) is None


# ----------------------------------------------------------------------------------------------------- downloading


def _download(origin: Origin) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    revision = origin.revision or DEFAULT_REVISION
    print(f"{origin.key}: downloading {origin.value} at {revision} from the hub", flush=True)
    allowed = _PATTERNS[origin.section]
    try:
        folder = snapshot_download(origin.value, revision=revision, allow_patterns=allowed, ignore_patterns=_IGNORED)
    except GatedRepoError:
        raise _gated(origin) from None
    except RepositoryNotFoundError:
        raise _not_here(origin, "is not on the hub, or is private (set HF_TOKEN in the environment)") from None
    except RevisionNotFoundError:
        raise UserError(f"{origin.section}.revision: {origin.value} has no branch, tag or commit {revision}") from None
    except LocalEntryNotFoundError as error:
        raise _not_here(origin, f"is not in the Hugging Face cache, and {_why_unreachable(error)}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{origin.key}: {origin.value} cannot be downloaded: {first}; by hand: {origin.download_command}"
        ) from None
    return Path(folder)


def _why_unreachable(error: BaseException) -> str:
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return f"{ENDPOINT} cannot be reached ({type(error.__cause__ or error).__name__})"


def _not_here(origin: Origin, why: str) -> UserError:
    kind = "folder" if origin.section == "model" else "folder or file"
    return UserError(
        f"{origin.key}: there is no {kind} {origin.value} here (in {Path.cwd()}), and as a hub name {origin.value} "
        f"{why}; correct it, or run where there is a network: {origin.download_command}"
    )


def _gated(origin: Origin) -> UserError:
    from huggingface_hub.constants import ENDPOINT

    return UserError(
        f"{origin.key}: {origin.value} is gated. Ask for access at {ENDPOINT}/{origin.value}, then set HF_TOKEN in the "
        "environment (never in a recipe) to a token of the account that has it, and start again, or run: "
        f"{origin.download_command}"
    )
