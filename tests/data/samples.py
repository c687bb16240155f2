"""What a global batch was made of, for tests."""

from turbolm.data.batch.loader import GlobalBatch


def sample_ids(batch: GlobalBatch) -> list[tuple[int, int, int]]:
    """What is trained on: (document, start, length) of each slice, in positions."""
    columns = (batch.sequences.document, batch.sequences.start, batch.sequences.length)
    return list(zip(*(column.tolist() for column in columns), strict=True))
