"""Validate the manifest of a token store before it is used: types, sizes, plain file names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_Count = Annotated[int, Field(ge=0, lt=2**62)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Only in the store's folder or its tokenizer's.
_FileName = Annotated[str, Field(pattern=r"^(?:tokenizer/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}$")]
_INDEX_ROW_BYTES = 16  # two int64 a document


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _File(_Part):
    file: _FileName
    bytes: _Count
    ends_sha256: _Hash
    sha256: _Hash


class _Split(_Part):
    documents: _Count
    tokens: _Count
    text_bytes: _Count


class _Shard(_Part):
    source: _Count
    tokens: _File
    index: _File
    train: _Split
    validation: _Split


class _TextLoss(_Part):
    sampled_bytes: _Count
    lost_bytes: _Count


class _Manifest(_Part):
    key: str
    dtype: Literal["<u2", "<u4"]
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    bos_id: _Count
    eos_id: _Count
    tokenizer_fingerprint: str
    tokenizer_files: Annotated[list[_File], Field(min_length=1)]
    sources: list[dict[str, Any]]
    shards: list[_Shard]
    text_loss: _TextLoss = _TextLoss(sampled_bytes=0, lost_bytes=0)  # not measured by earlier versions
    bad_documents: _Count = 0  # missing in manifests from before bad documents could be skipped
    first_bad_documents: list[str] = []
    short_documents: list[_Count] = []  # by source; only where a source has `min_tokens`

    @model_validator(mode="after")
    def _sizes_fit(self) -> _Manifest:
        if max(self.bos_id, self.eos_id) >= self.vocab_size:
            raise ValueError("bos_id and eos_id must be less than vocab_size")
        token_bytes = int(self.dtype[2:])
        if self.bad_documents and not self.first_bad_documents:
            raise ValueError("first_bad_documents must name some of the bad_documents")
        for shard in self.shards:
            documents = shard.train.documents + shard.validation.documents
            tokens = shard.train.tokens + shard.validation.tokens
            if shard.index.bytes != _INDEX_ROW_BYTES * documents or shard.tokens.bytes != token_bytes * tokens:
                raise ValueError(f"{shard.tokens.file} and {shard.index.file} have other sizes than their documents")
            if shard.source >= len(self.sources):
                raise ValueError(f"{shard.tokens.file} is of source {shard.source}, which does not exist")
        return self


def manifest_problem(manifest: dict[str, Any]) -> str | None:
    """Return the first problem with the content of a manifest, or None."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}" if where else first["msg"]
    return None
