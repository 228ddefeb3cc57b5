"""Imported by the server from which `spawn` forks the ranks: megatron-core takes seconds to import.

It also warns, ten lines long, of optional packages that are not there, which says nothing about a measurement.
"""

import importlib
import warnings

with warnings.catch_warnings(record=True):
    importlib.import_module("helix_megatron.bench.attention_ranks")
