"""The random state of Python and numpy, as a checkpoint's JSON holds it. Torch-free."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

_MT19937_WORDS = 624


def host_rng_state() -> dict[str, Any]:
    """The state of Python's and numpy's global generators."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }


def set_host_rng_state(saved: Mapping[str, Any], python: Any = random, numpy: Any = np.random) -> None:
    """Write `host_rng_state` back, into the global generators by default."""
    version, numbers, gauss = saved["python"]
    python.setstate((version, tuple(numbers), gauss))
    name, keys, position, *rest = saved["numpy"]
    if not 0 <= position <= _MT19937_WORDS:  # numpy (2.4) takes any, and reads beyond the end
        raise ValueError(f"a position of {position}")
    numpy.set_state((name, np.array(keys, dtype=np.uint32), position, *rest))


def host_rng_problem(saved: object) -> str | None:
    """What is wrong with the form of a saved state, or None; the global generators stay as they are."""
    try:
        set_host_rng_state(saved, random.Random(), np.random.RandomState())  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None
