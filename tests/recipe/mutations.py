"""Recipes and overrides broken at random, as a careless or hostile hand would: by their grammar and by their bytes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import yaml

from turbolm.recipe.messages import known_keys

# Values of every kind and size that YAML can hold, to stand where they do not belong.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 127, 4095, 4096, 4097, 2**31, 2**32, 2**53 + 1, 2**63, 10**12, 10**18,
    10**30,
    10**39, -(10**39), 10**60, 0.0, -0.0, 0.5, 1.5, 1e-300, 1e300, 1.8e308, 5e-324, float("nan"), float("inf"),
    float("-inf"), "", " ", "auto", "none", "off", "null", "~", "0", "-1", "1e5", "1e999", "NaN", "inf", "0x10", "0o7",
    "1_000", "4Ki", "2M", "1e30", "999999999T", "0%", "2%", "100%", "101%", "-5%", "1 step", "3 steps", "1e30 steps",
    "0 steps", "1h30m", "99999999999999999999d", "01:30:00", "cpu", "cuda", "bf16", "fp16", "fp32", "wsd", "cosine",
    "restarts", "inverse_sqrt", "muon", "soap", "adafactor", "growth", "buckets", "stages", "H100-80GB", "V100-16GB",
    "../../x", "/etc/passwd", "..", "/", "~root", "$HOME", "${x}", "`id`", "$(id)", "; rm -rf /", "a\nb", "a\0b",
    "\u202e",
    "é", "\U0001f600", "名前", "\ufeff", "\x85", "\u2028", "x" * 5000, "9" * 5000, "1e" + "9" * 50, [], {}, [[]],
    [None], [1, 2], [0.9, 0.95], ["a", "b"], {"a": 1}, {"": ""}, {"name": "wsd"}, {"model_type": "llama"}, {"0%": 1,
     "50%": 2},
    {"0%": 64, "100%": 128}, {"type": "text", "path": "x"}, [{"type": "stdlib"}], [{"type": "stdlib", "weight": 0}],
    {"name": "growth", "start": 8, "remix": 0.5, "remix_every": 1}, {"name": "buckets", "smallest": 8, "cycles": 10**9},
    {"name": "growth", "start": 8, "num_lengths": 10**9}, {"start": 8, "num_levels": 10**9}, {"at": {"0%": 64}},
]  # fmt: skip
_PLAUSIBLE = [
    True, False, 0, 1, 2, 8, 64, 128, 4096, 8192, 10**9, 10**12, 10**18, 10**30, 10**39, 0.5, 1e-300, 1e300,
    0.999999999999999,
    "1 steps", "10000000 steps", "1e30 steps", "0.0000001%", "50%", "100%", "1T", "1e30", "auto", "none", "off",
    "restarts",
    "wsd", "growth", {"name": "growth", "start": 8, "remix": 0.5, "remix_every": 1},
    {"name": "growth", "start": 8, "num_lengths": 10**9}, {"name": "buckets", "smallest": 8, "cycles": 10**9},
    {"start": 4096, "num_levels": 10**9}, {"start": 1e300, "end": 1e300, "over": "1e-9%"},
    {"start": 0.5, "end": 0.9, "over": 1}, {"0%": 1, "1e-9%": 2, "50%": 0},
]  # fmt: skip
_ALL_KEYS = sorted(known_keys())
KEYS = [
    "", " ", "extends", "<<", "name", "model", "lr", "type", "weight", "steps", "0%", "1e3", "a.b", "a b", "é",
    "\u202e", "x" * 300,
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "length_schedule",
    "batch_ramp",
    "weight_decay", "momentum", "seed", "label", "zero_stage", "hierarchical_partition", "gpu", "gpus_per_node",
    "num_nodes", "processes_per_node", "slurm", "seeds", "time", "environment", "cycle", "cycle_growth", "keep_every",
    "n_inner", "head_dim", "num_key_value_heads", "tie_word_embeddings", "max_position_embeddings",
]  # fmt: skip
EXTENDS = [
    ".", "..", "/", "config.yaml", "./config.yaml", "../../../../../../../../etc/hostname", "/etc/shadow", "/dev/zero",
    "/dev/stdin", "/proc/self/environ", "fifo.yaml", "fifo", "folder.yaml", "loop.yaml", "~/x", "", "\0", "x" * 5000,
    ["config.yaml"] * 70, [[]], [None],
    {"a": 1}, 3, "http://localhost/x.yaml", "link.yaml", "bytes.yaml",
]  # fmt: skip
PIECES = [
    ":", ": ", "- ", "{", "}", "[", "]", "[" * 2000, "{a: " * 200, "&a ", "*a", "*a\n", "<<: *a\n", "!!int ", "!x ",
    "!!python/object/apply:os.mkdir [canary] ", "!!python/name:os.system ", "!!binary ", "!!set {a} ", "!!omap ", "\n",
    "  ",
    "\t", "\n\t", "#", "'", '"', "|", ">", "|+\n", "---\n", "\n---\n", "...\n", "%YAML 9.9\n", "%TAG ! !!\n", "? ", "@",
    "`", "\r", "\r\n", "\x00", "\x07", "\x85", "\u2028", "\ufeff", "\ufffe", "\U0010ffff", "\\", '"\\ud800"', '"\\x00"',
    "null", "~", "1e999", ".nan", "-.inf", "0x", "9" * 500, "x" * 20000, "name: again\n", "extends: config.yaml\n",
]  # fmt: skip
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(20)
)


def grammar_mutation(rng: random.Random, text: str) -> str:
    """The text of a recipe with its meaning changed: parsed, changed and written again, or changed line by line."""
    if rng.random() < 0.7:
        tree = yaml.safe_load(text)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            rng.choice(_ON_TREES)(rng, tree)
        return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5))
    for _ in range(rng.choice([1, 1, 2, 5])):
        text = rng.choice(_ON_TEXT)(rng, text)
    return text


def byte_mutation(rng: random.Random, content: bytes) -> bytes:
    """The bytes of a recipe, some of them changed."""
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(9)
        if kind == 0 and content:
            flipped = bytearray(content)
            flipped[at % len(content)] ^= 1 << rng.randrange(8)
            content = bytes(flipped)
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content = content[:at] + b"\0" * rng.choice([1, 3, 4096]) + content[at:]
        elif kind == 3:
            content = (
                content[:at] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88", b"\x80"]) + content[at:]
            )
        elif kind == 4:
            content = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff", b"\x1f\x8b"]) + content
        elif kind == 5:
            content = content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\r", b"\x0b", b""]))
        elif kind == 6:
            content = content[:at] + rng.randbytes(rng.randrange(1, 40)) + content[at:]
        elif kind == 7:
            content = content.decode("utf-8", "ignore").encode(rng.choice(["utf-16", "utf-32", "utf-16-le", "utf-7"]))
        else:
            content = content[:at] + content * rng.choice([1, 2, 60]) + content[at:]
    return content


def override_mutation(rng: random.Random, text: str) -> str:
    """An override such as `optimizer.lr=3e-4`, with a key of the recipe or not, and any value."""
    places = [path for path, _ in _walk(yaml.safe_load(text))]
    key = ".".join(map(str, rng.choice(places))) if rng.random() < 0.4 else rng.choice(_ALL_KEYS)
    value = rng.choice(VALUES if rng.random() < 0.4 else _PLAUSIBLE)
    shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
    made = f"{key}={shown}"
    kind = rng.randrange(8)
    if kind == 0:
        made = f"{key}.{rng.choice(KEYS)}={shown}"
    elif kind == 1:
        made = f"{key}={rng.choice(PIECES)}{shown}"
    elif kind == 2:
        at = rng.randrange(len(made) + 1)
        made = made[:at] + rng.choice(PIECES) + made[at:]
    elif kind == 3:
        made = rng.choice(["=", "", "." * 50 + "=1", "a" * 100 + "=", f"{key}.0=1", f"{key}.-1=1", f"{key}.99999999=1"])
    elif kind == 4:
        made = f"{rng.choice(KEYS)}={shown}"
    return made


# ------------------------------------------------------------------------------------------------------ on the tree


def _walk(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place of the tree below the top, and its value; not all of a tree that holds itself."""
    if len(path) > 30:
        return
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key), value
        yield from _walk(value, (*path, key))


def _parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path[:-1]:
        tree = tree[part]
    return tree


def _pick(rng: random.Random, tree: Any) -> tuple[Any, Any]:
    """A container somewhere in the tree, and a key of it; the tree itself and a new key where it is empty."""
    places = [path for path, _ in islice(_walk(tree), 10_000)]
    if not places:
        tree["name"] = "x"
        return tree, "name"
    path = rng.choice(places)
    return _parent(tree, path), path[-1]


def _drop(rng: random.Random, tree: Any) -> None:
    holder, key = _pick(rng, tree)
    del holder[key]


def _rename(rng: random.Random, tree: Any) -> None:
    holder, key = _pick(rng, tree)
    if isinstance(holder, dict):
        name = str(key)
        at = rng.randrange(len(name) + 1)
        new = rng.choice(
            [rng.choice(KEYS), name[:at] + name[at + 1 :], name.upper(), name + "s", f" {name}", 3, None, True]
        )
        holder[new] = holder.pop(key)


def _replace(rng: random.Random, tree: Any) -> None:
    holder, key = _pick(rng, tree)
    holder[key] = copy.deepcopy(rng.choice(VALUES))


def _swap(rng: random.Random, tree: Any) -> None:
    (one, first), (other, second) = _pick(rng, tree), _pick(rng, tree)
    moved = copy.deepcopy(one[first])
    one[first] = copy.deepcopy(other[second])
    if second in other if isinstance(other, dict) else second < len(other):
        other[second] = moved


def _insert(rng: random.Random, tree: Any) -> None:
    holder, _ = _pick(rng, tree)
    value = copy.deepcopy(rng.choice(VALUES))
    if isinstance(holder, dict):
        holder[rng.choice(KEYS)] = value
    else:
        holder.insert(0, value)


def _nest(rng: random.Random, tree: Any) -> None:
    holder, key = _pick(rng, tree)
    for _ in range(rng.choice([1, 2, 30, 60])):
        holder[key] = rng.choice([[holder[key]], {"a": holder[key]}])


def _alias(rng: random.Random, tree: Any) -> None:
    """The same object at two places, which is written as an anchor and an alias; perhaps within itself."""
    (one, first), (other, second) = _pick(rng, tree), _pick(rng, tree)
    other[second] = one[first] if rng.random() < 0.8 else one


def _widen(rng: random.Random, tree: Any) -> None:
    holder, key = _pick(rng, tree)
    count = rng.choice([3, 100, 6000])
    holder[key] = [holder[key]] * count if rng.random() < 0.5 else {f"k{n}": n for n in range(count)}


def _extend(rng: random.Random, tree: Any) -> None:
    tree["extends"] = copy.deepcopy(rng.choice(EXTENDS))


def _scale(rng: random.Random, tree: Any) -> None:
    """A number of the recipe, times something."""
    numbers = [
        path
        for path, value in islice(_walk(tree), 10_000)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    if numbers:
        path = rng.choice(numbers)
        factor = rng.choice([-1, 0, 0.5, 1.5, 2, 3, 1000, 10**6, 10**12, 10**24])
        _parent(tree, path)[path[-1]] *= factor


_ON_TREES: list[Callable[[random.Random, Any], None]] = [
    _drop, _rename, _replace, _replace, _replace, _swap, _insert, _insert, _nest, _alias, _widen, _extend, _scale,
    _scale,
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ on the text


def _insert_piece(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(PIECES) + text[at + rng.choice([0, 0, 1, 10]) :]


def _change_line(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    at = rng.randrange(len(lines))
    line = lines[at]
    lines[at] = rng.choice(
        ["", line * 2, " " + line, "   " + line, "\t" + line, line.lstrip(), line.replace(":", "", 1),
         line.replace(": ", ":", 1),
         line.replace("\n", " ", 1), line.upper(), "- " + line, line.replace(":", ": &a", 1), line.replace(":",
         ": !!str", 1)]
    )  # fmt: skip
    if rng.random() < 0.2:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    return "".join(lines)


def _append(rng: random.Random, text: str) -> str:
    return text + rng.choice(
        [LAUGHS, LAUGHS + "model: *a20\n", "x: &x {y: *x}\n", "logging: &l [*l, *l]\n", "---\n" + text, "...\nmore\n",
         text,
         "base: &b {seed: 1}\ntrain: {<<: *b}\n", "? [a, b]\n: c\n", "name: !!python/object/apply:os.mkdir [canary]\n",
         "data: !!python/object:turbolm.Recipe {}\n", "k: " + "[" * 500 + "]" * 500 + "\n",
         "k: " + "{a: " * 40 + "1" + "}" * 40,
         "".join(f"k{n}: {n}\n" for n in range(9000)), "k: '" + "x" * 60000 + "'\n", "k: " + "x" * 200000,
         "# " + "x" * 140000,
         "".join(f"k{n}: &k{n} 1\n" for n in range(3000)), "a: *a\n", "é: 1\n", "'\\u0000': 1\n"]
    )  # fmt: skip


_ON_TEXT: list[Callable[[random.Random, str], str]] = [_insert_piece, _change_line, _change_line, _append]
