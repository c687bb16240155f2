"""Passwords, tokens and keys: known by the look of their names and places, and never written anywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
_MIN_VALUE_LENGTH = 8  # of an environment variable: a shorter value would hide ordinary words

# Environment variables, and what is assigned in capitals
_VARIABLE = (
    r"[A-Z0-9_]*(?:SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)[A-Z0-9_]*"
    r"|(?:[A-Z0-9_]*_)?(?:TOKEN|APIKEY)|[A-Z0-9_]*_(?:KEY|PAT|PASS|PWD)"
)
_SECRET_NAME = re.compile(_VARIABLE, re.IGNORECASE)
# Keys of files, headers and connection strings in any case. Not every *_token: eos_token and pad_token are no secrets
_KEY = (
    r"(?:[\w.-]*[_.-])?(?:pass|pwd|pat|cookie)"
    r"|[\w.-]*(?:secret|passw(?:or)?d|passphrase|credentials?|api[_-]?key"
    r"|(?:access|account|auth|private|secret|shared|signing|encryption)[_-]?key(?:[_-]?id)?"
    r"|(?:access|api|auth|bearer|git(?:hub|lab)|hf|hub|id|private|refresh|session|wandb)[_-]?token)"
)
_KEY_START = rf"(?<![\w.-])(?!(?-i:(?:OLD)?PWD)=)['\"]?(?:{_KEY})['\"]?"
_QUOTED = r"'[^'\n]+'|\"[^\"\n]+\""
_FREE = r"(?!['\"]?(?:[\s$]|\*\*\*))"  # no secret: $(cat file), $OTHER
_WORD = r"[^\s'\",;&}]+"
_ODD_WORD = r"(?=[^\s'\",;&}]*[\d_+/=!#%-])" + _WORD  # `password: expected text` is a message
_ISSUED = (  # tokens that their issuer made recognisable, as secret scanners know them
    r"hf_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
    r"|xox[abeprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}|AIza[\w-]{35}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|dckr_pat_[\w-]{20,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*"
)
_PATTERNS = (
    # user:password@ of a URL, whose password may hold an @, or a token in the place of the user
    (re.compile(r"(://)(?:[^/\s@:'\"]*:[^/\s'\"]+|[^/\s@:'\"]{20,})@"), rf"\1{HIDDEN}@"),
    # ?token=, &X-Amz-Signature=, ;sig=
    (
        re.compile(
            r"([?&;][\w.-]*(?:token|sig|signature|key|key-?id|secret|password|passwd|credential|auth)=)[^&\s'\"#;]+",
            re.I,
        ),
        rf"\1{HIDDEN}",
    ),
    # Authorization: Basic ..., and any other scheme
    (
        re.compile(r"(\b(?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?(?:[a-z]+\s+)?)[\w.~+/=-]{6,}", re.I),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(\b(?:Bearer|Basic)\s+)[\w.~+/-]{8,}=*", re.I), rf"\1{HIDDEN}"),
    # HF_TOKEN=hf_..., but not HF_TOKEN=$(cat file) or HF_TOKEN=$OTHER
    (re.compile(rf"((?<![A-Za-z0-9_])(?:{_VARIABLE})=['\"]?)(?![$'\"\s]|\*\*\*|$)[^\s'\"]+", re.ASCII), rf"\1{HIDDEN}"),
    # {HF_TOKEN: hf_...}, as YAML and JSON write it
    (re.compile(rf"([{{,]\s*['\"]?(?:{_VARIABLE})['\"]?:\s*['\"]?)(?![\s'\"])[^\s'\",}}]+", re.ASCII), rf"\1{HIDDEN}"),
    # "api_key": "...", password = '...', X-Api-Key: ..., AccountKey=...;
    (re.compile(rf"({_KEY_START}\s*=\s*){_FREE}(?:{_QUOTED}|{_WORD})", re.I), rf"\1{HIDDEN}"),
    (re.compile(rf"({_KEY_START}\s*:\s*){_FREE}(?:{_QUOTED}|(?<=\s){_ODD_WORD})", re.I), rf"\1{HIDDEN}"),
    (re.compile(rf"(?<![A-Za-z0-9_-])(?:{_ISSUED})"), HIDDEN),
)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret, such as HF_TOKEN or AWS_SECRET_ACCESS_KEY."""
    return _SECRET_NAME.fullmatch(name) is not None


def holds_secret(text: str) -> bool:
    """Whether a text spells out a password, a token or a key."""
    return _hide_patterns(text) != text


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without the secrets it spells out, and without the values of the environment's secret variables."""
    for name, value in environment.items():
        if is_secret_name(name) and len(value) >= _MIN_VALUE_LENGTH:
            text = text.replace(value, HIDDEN)
    return _hide_patterns(text)


def _hide_patterns(text: str) -> str:
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
