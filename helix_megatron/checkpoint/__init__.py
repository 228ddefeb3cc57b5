"""Checkpoints on disk: what a complete one is, where they lie, and how one is read without trusting it.

`manifest` says what a checkpoint directory must hold, with sizes and hashes. `store` keeps a directory of
checkpoints such that a kill at any moment leaves a complete one; `durable` has the writes that survive. `safe`
and `torch_files` read the pickles that torch and megatron-core write, without executing what is in them.
"""
