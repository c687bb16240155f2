"""Passwords, tokens and keys: known by the look of their names and places, and never written anywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
_MIN_VALUE_LENGTH = 8  # of an environment variable: a shorter value would hide ordinary words

_NAME = (
    r"[A-Z0-9_]*(?:SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)[A-Z0-9_]*"
    r"|(?:[A-Z0-9_]*_)?(?:TOKEN|APIKEY)|[A-Z0-9_]*_(?:KEY|PAT)"
)
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_PATTERNS = (
    # user:password@ of a URL, or a token in the place of the user
    (re.compile(r"(://)(?:[^/\s@:'\"]*:[^/\s@'\"]+|[^/\s@:'\"]{20,})@"), rf"\1{HIDDEN}@"),
    # ?token=, &X-Amz-Signature=, ;sig=
    (
        re.compile(
            r"([?&;][\w.-]*(?:token|sig|signature|key|key-?id|secret|password|passwd|credential|auth)=)[^&\s'\"#;]+",
            re.I,
        ),
        rf"\1{HIDDEN}",
    ),
    # HF_TOKEN=hf_..., but not HF_TOKEN=$(cat file) or HF_TOKEN=$OTHER
    (re.compile(rf"((?<![A-Za-z0-9_])(?:{_NAME})=['\"]?)(?![$'\"\s]|\*\*\*|$)[^\s'\"]+", re.ASCII), rf"\1{HIDDEN}"),
    # {HF_TOKEN: hf_...}, as YAML and JSON write it
    (re.compile(rf"([{{,]\s*['\"]?(?:{_NAME})['\"]?:\s*['\"]?)(?![\s'\"])[^\s'\",}}]+", re.ASCII), rf"\1{HIDDEN}"),
    # Authorization: Bearer ...
    (re.compile(r"(\bBearer\s+)[\w.~+/-]{8,}=*", re.I), rf"\1{HIDDEN}"),
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
