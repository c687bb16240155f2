"""Checkpoints: one format for every ZeRO stage, offload setting and world size, without pickles.

    step-00000120/
      fragments-<rank>.safetensors   `<state>/<parameter>`: the elements of the flattened tensor this rank owns
      fragments-<rank>.json          whole shape and first element of each, scalar optimizer state
      buffers.safetensors            the model's persistent buffers, if it has any
      trainer.json                   step, tokens seen, next batch, loss scaler
      manifest.json                  size and SHA-256 of every file; written last

`<state>` is `weight` (fp32) or the name of an optimizer state tensor. A checkpoint is written under a temporary name
and renamed into place when it is complete.
"""
