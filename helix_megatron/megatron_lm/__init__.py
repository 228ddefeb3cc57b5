"""An unmodified Megatron-LM checkout with Helix: `python -m helix_megatron.launch PATH/pretrain_gpt.py …`.

For a fork that would rather have two lines of its own than a launcher, where the script begins to run:

    import helix_megatron.megatron_lm
    helix_megatron.megatron_lm.install()

What is replaced is listed in `hooks`, one unit each; what stands in for a GPU in `cpu`.
"""

from __future__ import annotations


def install() -> None:
    """Put every hook in place, and without CUDA the stand-ins; applied twice is applied once.

    Imports torch and Megatron-LM, which must be on the search path.

    Raises:
        HelixError: a hook cannot be applied, with the version found and the versions known. Nothing is
            replaced then.
    """
    from helix_megatron.megatron_lm import cpu, hooks

    cpu.install()
    try:
        hooks.TABLE.install()
    except BaseException:
        cpu.uninstall()
        raise


def uninstall() -> None:
    from helix_megatron.megatron_lm import cpu, hooks

    hooks.TABLE.uninstall()
    cpu.uninstall()
