"""The one rule for paths in a recipe, and folders made from them. Torch-free.

- `~` and `~user` at the start mean a home folder.
- `$NAME` and `${NAME}` mean the environment variable, unless something of that very name is there already. A variable
  that is not set is refused by name. (`./~` and a name that is there are taken as written.)
- A relative path is relative to the working directory of the command. Only `extends` and `scale.from` are relative to
  their own file.
- What is no path of this machine is passed on as written: names on the hub, URLs, a container's image and mounts. In
  URLs `$NAME` is refused, and in the two others `~` and `$`, as nobody would replace them.

The recipe, its fingerprint and the run directory keep what was written; the rule is applied where a path is used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from pathlib import Path

from turbolm.errors import UserError, explain_os_error

PATH_RULE = "~, ~user, $NAME and ${NAME} are replaced; relative to the working directory"
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def expand_path(text: str) -> Path:
    """The path that `text` means by the rule above. Raises ValueError where it means none."""
    whole = os.path.expanduser(text)
    if text.startswith("~") and (whole == text or (text.split("/")[0] == "~" and os.environ.get("HOME") == "")):
        raise ValueError(f"{text}: there is no home folder for {text.split('/')[0]!r}; write the whole path")
    path = Path(whole)
    if "$" not in text:
        return path
    found = Path()
    for part in path.parts:
        # A variable may begin with a slash and is no new root for that.
        meant = part if "$" not in part or os.path.lexists(found / part) else expand_variables(part)
        found = Path(f"{found}/{meant}") if found.parts else Path(meant)
    return found


def expand_variables(text: str) -> str:
    """The text with its variables replaced. Raises ValueError for one that is not set, or is empty."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ValueError(f"{text}: the environment variable {name} is not set; set it, or write the path out")
        return os.environ[name]

    expanded = _VARIABLE.sub(value, text)
    if "${" in _VARIABLE.sub("", text):
        raise ValueError(f"{text}: expected ${{NAME}} with the name of an environment variable")
    return expanded


def use_path(text: str, key: str) -> Path:
    """`expand_path` of the recipe's `key`. Raises UserError."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def make_folder(path: Path, key: str) -> None:
    """Make a folder that a command is about to write to, and try it. Raises UserError, and leaves nothing half-made."""
    made = []
    try:
        for folder in [*reversed(path.parents), path]:
            if not os.path.lexists(folder):
                with contextlib.suppress(FileExistsError):  # another process made it meanwhile
                    folder.mkdir()
                    made.append(folder)
            if not stat.S_ISDIR(folder.stat().st_mode):  # which a link that leads nowhere fails
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        probe = path / f".turbolm-{os.getpid()}"
        try:
            probe.write_bytes(bytes(4096))  # a full file system makes folders, and files of no size
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another process uses it already
                folder.rmdir()
        raise UserError(f"{key}: {path} cannot be written: {explain_os_error(error)}") from None
