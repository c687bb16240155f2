"""Record the collectives of a training step, as c10d operators, on every rank of a real world."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# The operator's name, and which of its arguments is the larger side of the transfer.
_OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "barrier": ("barrier", None),
}
_FUNCTIONAL = {"all_to_all_single": "all_to_all", "all_reduce": "all_reduce"}  # of what a compiler can see


class Recorder(TorchDispatchMode):
    """Notes (kind, bytes, dtype, ranks of the group) of every collective of this thread, in order.

    DeepSpeed binds torch.distributed's functions when it is imported, so patching them sees nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, str, int]] = []

    def note_functional(self, name: str, args: Any) -> None:
        """Note an operator of `_c10d_functional`, which has the input first and the group's name last."""
        tensor, size = args[0], dist.distributed_c10d._resolve_process_group(args[-1]).size()
        num_bytes = tensor.numel() * tensor.element_size()
        self.seen.append((_FUNCTIONAL[name], num_bytes, str(tensor.dtype).removeprefix("torch."), size))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            kind, index = _OPERATORS.get(name, (name, 0))
            tensors: list[torch.Tensor] = []
            if index is not None:
                torch.utils._pytree.tree_map_only(torch.Tensor, tensors.append, args[index])
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            self.seen.append((kind, num_bytes, dtype, group.size()))
        name = func._schema.name.rpartition("::")[2]
        if func.namespace == "_c10d_functional" and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.note_functional(name, args)
        return func(*args, **(kwargs or {}))
