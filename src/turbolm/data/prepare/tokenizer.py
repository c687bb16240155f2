"""Tokenizers: train a byte-level BPE, or read one from local files. `tokenizers` is imported where it is used.

Folders are in the Hugging Face layout, so `AutoTokenizer.from_pretrained(folder)` reads them too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbolm.errors import UserError
from turbolm.files import sha256_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# How text is split before merging, as in GPT-4 (cl100k_base): numbers by three digits, line ends with what precedes.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CHAT_FILES = ("chat_template.jinja", "chat_template.json")
_SPECIAL = ("bos_token", "eos_token")
# Used when a tokenizer.json alone does not say which special tokens begin and end a text.
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>")
_EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with `vocab_size` tokens: token 0 is `<|endoftext|>`, then all 256 bytes, then the merges.

    The result depends only on the texts, not on their order.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"The training text is too small for tokenizer.train.vocab_size {vocab_size}: it gives "
            f"{tokenizer.get_vocab_size()} tokens. Lower vocab_size to at most that, raise "
            "tokenizer.train.sample_bytes, or add text to data.sources."
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, bos: str = END_OF_TEXT, eos: str = END_OF_TEXT) -> None:
    """Write `tokenizer` to a new or existing folder in the Hugging Face layout; eos is the padding token."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # what Transformers writes for "no limit"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a folder or a tokenizer.json, without truncation and padding.

    Special tokens that a text spells out become ordinary tokens, so that no text can end a document.
    """
    from tokenizers import Tokenizer

    file = _tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UserError(f"{file} is no tokenizer that `tokenizers` can read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_ids(path: str | Path, tokenizer: Tokenizer | None = None) -> tuple[int, int]:
    """Return the token ids (bos, eos) that begin and end a document; a tokenizer with one of the two uses it for both.

    `tokenizer` is the one at `path`, if it is already loaded.
    """
    bos, eos = _special_tokens(Path(path))
    tokenizer = tokenizer or load_tokenizer(path)
    ids = []
    for token in (bos or eos, eos or bos):
        token_id = tokenizer.token_to_id(token) if token else None
        if token_id is None:
            raise UserError(
                f"The tokenizer {path} has no bos or eos token"
                + (f" ({token!r} is not in its vocabulary)" if token else "")
                + "; name one in its tokenizer_config.json (bos_token, eos_token)"
            )
        ids.append(token_id)
    return ids[0], ids[1]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the largest token id plus one (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def copy_tokenizer(path: str | Path, folder: Path) -> None:
    """Copy a tokenizer (folder or tokenizer.json) to a new folder in the Hugging Face layout."""
    file = _tokenizer_file(path)
    if Path(path).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*_FILES, *_CHAT_FILES):
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
    else:
        special_ids(path)
        bos, eos = _special_tokens(Path(path))
        save_tokenizer(load_tokenizer(path), folder, str(bos or eos), str(eos or bos))


def tokenizer_fingerprint(tokenizer: str | Path | Tokenizer) -> str:
    """Return a SHA-256 of the canonical content of tokenizer.json, without the parts that no store depends on.

    Those are truncation, padding and the post-processor, which adds special tokens; Transformers rewrites all three.
    """
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    unused = ("truncation", "padding", "post_processor")
    content = json.loads(tokenizer.to_str())
    content = {name: value for name, value in content.items() if name not in unused}
    return sha256_json(content)


def _tokenizer_file(path: str | Path) -> Path:
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        hint = ""
        if path.is_dir():
            hint = "; convert it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        raise UserError(f"There is no tokenizer at {file} (in {Path.cwd()}){hint}")
    return file


def _special_tokens(path: Path) -> tuple[str | None, str | None]:
    """Return the texts of the bos and eos tokens from the files, or as guessed from a tokenizer.json alone."""
    named: dict[str, Any] = {}
    if path.is_dir():
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (path / name).is_file():
                try:
                    content = json.loads((path / name).read_text(encoding="utf-8"))
                except (OSError, ValueError, RecursionError) as error:
                    raise UserError(f"{path / name} is not valid JSON: {error}") from None
                if not isinstance(content, dict):
                    raise UserError(f"{path / name} is not a JSON object")
                named |= {key: content[key] for key in _SPECIAL if content.get(key)}
    if named:
        texts = [value.get("content") if isinstance(value, dict) else value for value in map(named.get, _SPECIAL)]
        if not all(isinstance(text, str | None) for text in texts):
            raise UserError(f"{path}: bos_token and eos_token must be text, got {texts}")
        return texts[0], texts[1]
    added = {token.content for token in load_tokenizer(path).get_added_tokens_decoder().values() if token.special}
    return next((t for t in _BOS_NAMES if t in added), None), next((t for t in _EOS_NAMES if t in added), None)
