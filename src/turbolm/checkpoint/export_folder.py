"""The folder of an exported model: which files export wrote, and nothing in them that names code. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turbolm.checkpoint.manifest import remove_folder
from turbolm.errors import UserError
from turbolm.files import read_json, sha256_file, write_atomic, write_json

RECORD = "turbolm_export.json"  # size and SHA-256 of each file that export wrote, and whose weights they are
_NAMES_CODE = {"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "code_revision"}
_OF_A_CUT_UPDATE = re.compile(rf"(README\.md|{re.escape(RECORD)})\.\d+\.tmp")
_MAX_NAMED = 3


@dataclass(frozen=True)
class Origin:
    """Whose weights an export has: those of a checkpoint, or with `averaged` a mean; `run` is the name of the run."""

    run: str
    checkpoint: str
    averaged: bool = False

    def __str__(self) -> str:
        return f"{self.checkpoint} (averaged weights)" if self.averaged else self.checkpoint


def read_origin(export: Path) -> Origin | None:
    """Return whose weights an export has; None if it does not say."""
    found = (read_json(export / RECORD) or {}).get("origin")
    try:
        return Origin(**found) if isinstance(found, dict) else None
    except TypeError:
        return None


def check_replaceable(out: Path) -> None:
    """Raise UserError, naming files, unless nothing is at `out` but what an export wrote."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UserError(f"{out} is not a folder but a {'link' if out.is_symlink() else 'file'}; choose another folder")
    if _is_early_export(out):
        return
    others = _others(out)
    if others:
        more = f" and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
        raise UserError(
            f"{out} holds what no export wrote, or what was changed since: {', '.join(others[:_MAX_NAMED])}{more}; "
            "move that away, or choose another folder"
        )


def replace_export(out: Path, new: Path, origin: Origin | None = None) -> None:
    """Record files and origin of `new` and rename it to `out`, in place of an earlier export. Raises UserError."""
    files = {name: {"bytes": (new / name).stat().st_size, "sha256": sha256_file(new / name)} for name in _files(new)}
    write_json(new / RECORD, {"files": files} | ({"origin": asdict(origin)} if origin else {}))
    check_replaceable(out)
    if out.is_dir() and _is_early_export(out):
        number = 1
        while os.path.lexists(aside := out.with_name(f"{out.name}.{number}")):
            number += 1
        out.rename(aside)
        print(f"turbolm: {out} has no record of what an export wrote there; it is moved to {aside}", file=sys.stderr)
    remove_folder(out)
    new.rename(out)


def update_card(folder: Path, heading: str, section: str) -> bool:
    """Write `section`, which begins with `heading`, to the end of an export's model card, in place of an earlier one.

    Returns whether it was written: a card that export did not write, or that was changed since, stays as it is. A call
    that is cut leaves the card as it was or as it will be, and a record that knows both.
    """
    card, record = folder / "README.md", read_json(folder / RECORD) or {}
    if not written_files(folder).get(card.name):
        return False
    before = card.read_bytes()
    kept = before.decode().partition(f"\n{heading}\n")[0]
    text = f"{kept.rstrip()}\n\n{section}"
    record["files"][card.name] = {**_described(before), "next": _described(text.encode())}
    write_json(folder / RECORD, record)
    record["files"][card.name] = write_atomic(card, text)
    write_json(folder / RECORD, record)
    return True


def _described(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def drop_code(folder: Path) -> None:
    """Take all that names code to import out of every JSON file of an export but its tokenizer, and its Python files.

    Of a published model they name code that is not in the folder, and that plain Transformers would ask to run.
    """
    for path in folder.rglob("*.py"):
        path.unlink()
    for path in folder.glob("*config.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        plain = _without_code(values)
        if plain != values:
            path.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(child) for key, child in value.items() if key not in _NAMES_CODE}
    return [_without_code(child) for child in value] if isinstance(value, list) else value


def _files(folder: Path) -> list[str]:
    """Everything below the folder that is not a folder itself."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())


def written_files(folder: Path) -> dict[str, bool]:
    """Return the names of the files that export wrote to `folder`, and whether each is still as it was written.

    Empty without a record.
    """
    files = (read_json(folder / RECORD) or {}).get("files")
    recorded = files if isinstance(files, dict) else {}
    return {name: _is_as_written(folder / name, entry) for name, entry in recorded.items()}


def _is_as_written(path: Path, entry: Any) -> bool:
    if not isinstance(entry, dict) or path.is_symlink() or not path.is_file():
        return False
    size, digest = path.stat().st_size, sha256_file(path)
    return any(
        isinstance(one, dict) and (size, digest) == (one.get("bytes"), one.get("sha256"))
        for one in (entry, entry.get("next"))  # of a card whose update was cut
    )


def _others(folder: Path) -> list[str]:
    written = written_files(folder)
    return [
        name
        for name in _files(folder)
        if not (written.get(name) or (written and (name == RECORD or _OF_A_CUT_UPDATE.fullmatch(name))))
    ]


def _is_early_export(folder: Path) -> bool:
    """Whether a version before the record exported here: what is in the folder cannot be told from the user's own."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return not (folder / RECORD).exists() and (folder / "config.json").is_file() and "turbolm" in card
