"""Run a script of an unmodified Megatron-LM checkout with Helix.

    torchrun --nproc-per-node 4 -m helix_megatron.launch PATH/TO/pretrain_gpt.py \\
        <the script's own arguments> --intra-head-parallel-size 2

The script runs as it would by itself: as `__main__`, its folder first on the search path, so with its own
checkout's megatron. Only the attributes that `helix_megatron.megatron_lm` lists are replaced before.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

from helix_megatron.arguments import exit_on_error
from helix_megatron.errors import HelixError
from helix_megatron.run.rank_environment import launched_ranks

USAGE = """usage: torchrun … -m helix_megatron.launch PATH/TO/pretrain_gpt.py ARGUMENTS

Runs a script of a Megatron-LM checkout with Helix. ARGUMENTS are the script's own and Helix's:
  --intra-head-parallel-size M   segments of every attention head
  --helix-dry-run                print configuration, groups and hooks, and stop
All are shown by … -m helix_megatron.launch PATH/TO/pretrain_gpt.py --help"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Wrong input prints one paragraph and exits with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    with exit_on_error(os.path.basename(arguments[0]), foreign=True):
        launched_ranks()
        script = _checked(arguments[0])
        sys.argv = [script, *arguments[1:]]
        sys.path.insert(0, os.path.dirname(script))
        main_module = types.ModuleType("__main__")
        # Processes that multiprocessing starts begin by importing what `__spec__` names: this module.
        main_module.__spec__ = importlib.util.find_spec("helix_megatron.launch")
        _keep.append(sys.modules["__main__"])
        sys.modules["__main__"] = main_module
        _run(script, main_module)


def _run(script: str, module: types.ModuleType) -> None:
    """Install the hooks and execute the script in a module, as Python would by itself."""
    from helix_megatron import megatron_lm

    megatron_lm.install()
    module.__file__ = script
    with open(script, "rb") as file:
        # Without the future statements of this module.
        code = compile(file.read(), script, "exec", dont_inherit=True)
    exec(code, module.__dict__)


def _checked(script: str) -> str:
    path = os.path.abspath(script)
    if not os.path.isfile(path):
        raise HelixError(
            f"there is no script {script}. Give the path of pretrain_gpt.py in a Megatron-LM checkout."
        )
    sys.path.insert(0, os.path.dirname(path))
    try:
        found = importlib.util.find_spec("megatron.training") is not None
    except ModuleNotFoundError:
        found = False
    finally:
        sys.path.pop(0)
    if not found:
        raise HelixError(
            f"no megatron.training beside {script} nor on PYTHONPATH. The script must be in a Megatron-LM "
            "checkout; the package megatron-core has a training loop only since 0.18."
        )
    return path


_keep: list[Any] = []  # the module that ran as `__main__` before; its functions are still running
_child: list[types.ModuleType] = []


def __getattr__(name: str) -> Any:
    """In a process that multiprocessing started: the script's functions, if any is asked for.

    Most such processes (the writers of checkpoints among them) never ask, and never import the script.
    """
    if __name__ != "__mp_main__" or name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _child:
        _child.append(types.ModuleType("__mp_main__"))
        _run(sys.argv[0], _child[0])
    return getattr(_child[0], name)


if __name__ == "__main__":
    main()
