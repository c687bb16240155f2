"""Peak memory and time of the loss at a vocabulary of 128k: all logits at once, and chunk by chunk.

    python benchmarks/loss_memory.py [--tokens 2048] [--width 512] [--vocab 131072] [--threads 1]

Forward and backward pass of the output head and its loss, each kind in a process of its own, so that the peak resident
memory is its own; what the weights, the inputs and their gradients take is measured as well and taken off. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

KINDS = ("nothing", "full", "chunked")


def measure(kind: str, tokens: int, width: int, vocab: int, threads: int) -> dict[str, float]:
    """Peak resident bytes and processor seconds of a second pass, in this process."""
    from turbolm.models.loss import chunked_linear_loss, summed_loss

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.empty(vocab, width).normal_(0, 0.02).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))
    seconds = loss = 0.0
    for _ in range(2):
        start = time.process_time()
        hidden.grad = weight.grad = None
        if kind == "nothing":  # gradients as large as the real ones
            hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
        else:
            if kind == "full":
                objective, _ = summed_loss(F.linear(hidden, weight), targets)
            else:
                objective, _ = chunked_linear_loss(hidden, weight, None, targets)
            (objective / tokens).backward()
            loss = float(objective.detach()) / tokens
            del objective
        seconds = time.process_time() - start
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak_bytes, "seconds": seconds, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.tokens, arguments.width, arguments.vocab, arguments.threads)
    if arguments.kind:
        print(json.dumps(measure(arguments.kind, *sizes)))
        return
    results = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--kind", kind]
        for name in ("tokens", "width", "vocab", "threads"):
            command += [f"--{name}", str(getattr(arguments, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[kind] = json.loads(done.stdout.splitlines()[-1])
        print(kind, results[kind], flush=True)
    added = {kind: results[kind]["peak_bytes"] - results["nothing"]["peak_bytes"] for kind in ("full", "chunked")}
    figures = {
        "added_bytes": added["chunked"],
        "seconds": results["chunked"]["seconds"],
        "logits_bytes": 4 * arguments.tokens * arguments.vocab,
        "loss_difference": abs(results["full"]["loss"] - results["chunked"]["loss"]) / results["full"]["loss"],
    }
    rivals = {"full": {"added_bytes": added["full"], "seconds": results["full"]["seconds"]}}
    targets = {"added_bytes_share_of_full": 0.5, "loss_difference": 1e-6}
    met = {
        "added_bytes_share_of_full": added["chunked"] <= 0.5 * added["full"],
        "loss_difference": figures["loss_difference"] <= 1e-6,
    }
    print(json.dumps({"bench": "loss_memory", "figures": figures, "rivals": rivals, "targets": targets, "met": met}))


if __name__ == "__main__":
    main()
