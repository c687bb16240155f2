"""What `execution.sequence_parallel` asks of the rest of a recipe. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Iterator

KEY = "execution.sequence_parallel"
KERNELS = ("auto", "sdpa", "varlen", "flex")  # of execution.attention; the others mask inside the model's own code
SHOWN = ("gpt2", "llama", "mistral", "mixtral", "olmo2", "qwen2", "qwen3", "qwen3_moe", "smollm3")
"""Types that it is proposed for: tests compare their slices with whole sequences. Others are tried at the start."""
_MOST_SUGGESTED = 128
DEEPSPEED_ULYSSES = (
    "DeepSpeed's own sequence parallelism lets packed documents see each other (it drops their mask), and its "
    "gradients at ZeRO stages 1 and 2 are as many times too large as there are processes in a group; remove it, and "
    f"set {KEY}"
)


def not_a_divisor(count: int, total: int, what: str) -> str:
    """Return the message for a size that does not divide `total`, which is so many of `what`, with sizes that do."""
    divisors = [number for number in range(1, min(total, _MOST_SUGGESTED) + 1) if total % number == 0]
    return f"must divide the {total} {what}, got {count}; set one of {', '.join(map(str, divisors))}"


def sequence_problems(
    shared_by: int, lengths: Collection[int], heads: int | None = None, attention: str | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for what does not go with groups of `shared_by` processes.

    `lengths` are sequence lengths in tokens; `heads` those of a layer, None if unknown.
    """
    if shared_by == 1:
        return
    for length in sorted(lengths):
        if length % shared_by:
            yield KEY, not_a_divisor(shared_by, length, "tokens of a sequence (data.seq_len and data.length_schedule)")
            break
    if heads is not None and heads % shared_by:
        yield KEY, not_a_divisor(shared_by, heads, "attention heads of the model")
    if attention is not None and attention not in KERNELS:
        yield (
            "execution.attention",
            f"{attention} does not work with {KEY}, which needs the kernel apart from the model; set attention: auto, "
            "or one of varlen, sdpa and flex",
        )
