"""Upload an export to the Hugging Face hub, all of it in one commit. Torch-free.

The token comes from the environment (HF_TOKEN) or from `hf auth login`, never from a recipe.
"""

from __future__ import annotations

import re
from pathlib import Path

from turbolm.checkpoint.export_folder import RECORD, written_files
from turbolm.errors import UserError
from turbolm.recipe.fields import REPOSITORY_NAME

CARD = "README.md"
_WEIGHTS = (".safetensors", ".safetensors.index.json")


def check_token(key: str) -> None:
    """Raise UserError, which begins with `key`, if there is no token or the hub is switched off."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise UserError(f"{key}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or push later")
    if get_token() is None:
        raise UserError(
            f"{key}: pushing to the hub needs a token that may write; set HF_TOKEN in the environment (never in a "
            "recipe), or run `hf auth login`"
        )


def push_export(export: Path, repository: str, *, private: bool, key: str = "REPO") -> str:
    """Upload what export wrote, and the model card as it is now; return the address of the model.

    Weights of an earlier push that this export does not have are deleted in the same commit. A push that was cut goes
    on where the hub has a file already. Raises UserError: for a folder that is no export or has changed, for a public
    repository where `private` is asked for, and for what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not re.fullmatch(REPOSITORY_NAME, repository):
        raise UserError(f"{key}: expected `name` or `owner/name` of the hub, got {repository[:100]!r}")
    names = _files_to_push(export)
    check_token(key)
    api = HfApi()
    try:
        made = api.create_repo(repository, private=True if private else None, exist_ok=True).repo_id
        if private and api.model_info(made).private is not True:
            raise UserError(f"{key}: {made} is public on the hub; make it private there, or push without --private")
        there = set(api.list_repo_files(made))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=export / name) for name in names
        ]
        stale = sorted(name for name in there - set(names) if "/" not in name and name.endswith(_WEIGHTS))
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        api.create_commit(made, operations, commit_message=f"Export of turbolm: {len(names)} files")
    except UserError:
        raise
    except HfHubHTTPError as error:
        raise UserError(f"{key}: {_refusal(error, repository)}") from None
    except Exception as error:  # connections have no base class in common
        reason = next((line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()), "")
        raise UserError(
            f"{key}: the push to {repository} was cut ({type(error.__cause__ or error).__name__}: {reason[:200]}); "
            "the same command goes on with the files that the hub does not have"
        ) from None
    return f"{api.endpoint}/{made}"


def _files_to_push(export: Path) -> list[str]:
    """Return the names of the files that export wrote. Raises UserError unless they are as they were written.

    The card may have grown, but what a link leads to is not pushed.
    """
    written = written_files(export)
    if not written:
        raise UserError(f"{export}: expected the folder of an export, with {RECORD}; `turbolm export` makes one")
    changed = [name for name, is_same in written.items() if not is_same and name != CARD]
    if changed:
        raise UserError(
            f"{export}: {', '.join(changed[:3])} changed since the export was written; "
            "export again, so that what is pushed is what was trained"
        )
    names = [*written, RECORD]
    others = [name for name in names if (export / name).is_symlink() or not (export / name).is_file()]
    if others:
        raise UserError(f"{export}: {', '.join(others)}: missing, or not a plain file; put it back, or export again")
    return names


def _refusal(error: object, repository: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = str(getattr(error, "server_message", None) or error).strip().splitlines()
    reason = said[0][:200] if said else type(error).__name__
    if status in (401, 403):
        return f"the hub does not let this token write to {repository} ({reason}); it needs write access there"
    return f"the hub refused the push to {repository}: {reason}"
