"""Matrix products of hidden layers in 8 bits (Micikevicius et al., arXiv 2209.05433), by torchao."""

from __future__ import annotations

from torch import nn

from turbolm.errors import UserError

_MULTIPLE = 16  # of a tensor core's operands in 8 bits


def apply_fp8(model: nn.Module, recipe_name: str, *, emulate: bool = False) -> list[str]:
    """Make hidden linear layers of `model` multiply in 8 bits, in place; returns their names.

    `recipe_name` is `tensorwise` or `rowwise`: what shares a scale. Inputs, weights and gradients are scaled to their
    largest element in every step, so nothing has to be kept between steps and parameters stay what they are. The output
    head stays in bf16, as in torchao's own recipes: small logits decide. `emulate` does the same in fp32, for tests.

    Raises UserError where no layer can be converted.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.config import Float8LinearRecipeName

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    converted: list[str] = []

    def is_wanted(module: nn.Module, name: str) -> bool:
        wanted = (
            isinstance(module, nn.Linear)
            and module is not head
            and module.in_features % _MULTIPLE == 0
            and module.out_features % _MULTIPLE == 0
        )
        if wanted:
            converted.append(name)
        return wanted

    config = Float8LinearConfig.from_recipe_name(Float8LinearRecipeName(recipe_name))
    if emulate:
        object.__setattr__(config, "emulate", True)
    convert_to_float8_training(model, module_filter_fn=is_wanted, config=config)
    if not converted:
        raise UserError(
            f"train.fp8: this model has no linear layer whose sides are multiples of {_MULTIPLE} (those of "
            "Transformers' GPT-2 are of another kind); set train.fp8: off"
        )
    return converted
