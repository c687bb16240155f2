"""Checkpoints: one format for every ZeRO stage, offload setting and world size, without pickles.

    step-00000120/
      fragments-<rank>.safetensors     `<state>/<parameter>`: the elements of the flattened tensor this rank owns;
      fragments-<rank>.<n>.safetensors   more of them, so that large ones are written and hashed in parallel
      fragments-<rank>.json            first element and number of each, scalar optimizer state, random state
      buffers.safetensors              the model's persistent buffers, if it has any
      trainer.json                     step, tokens seen, order of the data, loss scaler, anomalies
      manifest.json                    size and SHA-256 of every file; written last

`<state>` is `weight` (fp32), `weight_average` (their mean, `evaluation.weight_average`) or the name of an optimizer
state tensor. Tensors that are not of the parameter's shape are `whole/<state>/<parameter>`. A checkpoint is written
under a temporary name and renamed into place when it is complete. A start loads the newest one that verifies; if
loading it fails on any rank, all ranks try the one before.

Rank 0 alone reads the manifest and the index files (`fragments-<rank>.json`) of a resume, and gives each rank what it
needs; verifying is shared. At 512 ranks and 70B a save writes 30 MB of index files and manifest. The headers of the
tensor files, which safetensors needs, are another 0.26 MB beside 1.65 GB of tensors for each rank.
"""
