"""The only package that knows DeepSpeed's internals.

Everything else works with `engine.Engine`, whatever the ZeRO stage. DeepSpeed has no public way to read and write its
partitions, to judge an update before it is applied, or to build a model twice, so this package uses attributes that
DeepSpeed does not document. tests/engine/test_contract.py names each of them and fails by name when one goes away;
`versions.check_versions` refuses versions that were not tested.

  start.py       process groups and Accelerate      partitions.py  what each rank owns of every parameter
  engine.py      `Engine`                           state.py       the optimizer's state before its first step
  hooks.py       a gate between gradients and update  lookahead.py, averaged_weights.py   vectors beside the weights
  sharding.py    models whose parameters ZeRO-3 partitions while they are built
"""
