"""`helix doctor`: what of Helix works in this environment, and what to do about the rest.

With `--megatron PATH` it looks at a checkout of Megatron-LM instead, and imports nothing of it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from helix_megatron import __version__
from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.errors import HelixError
from helix_megatron.flags import INPUT_DIRECTORY
from helix_megatron.versions import PYTHONS, TESTED, found_version

PROGRAM = "helix doctor"


class Host(NamedTuple):
    """A library that Helix works inside of, by the name that its users know; `packages` are names on PyPI.

    `modules` of Helix import what is used of it; `check`, as `module:function`, returns a sentence for each
    thing that is missing; `install` is the command that installs it.
    """

    name: str
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    check: str
    install: str


HOSTS = (
    Host(
        "megatron-core",
        ("megatron-core",),
        ("helix_megatron.megatron.specs", "helix_megatron.megatron.dist_checkpoint"),
        "helix_megatron.megatron.upstream:check",
        "pip install helix_megatron",
    ),
    Host(
        "Hugging Face",
        ("transformers", "accelerate"),
        ("helix_megatron.huggingface",),
        "helix_megatron.huggingface.upstream:check",
        "pip install 'helix_megatron[huggingface]'",
    ),
    Host(
        "DeepSpeed",
        ("deepspeed",),
        ("helix_megatron.deepspeed",),
        "helix_megatron.deepspeed.upstream:check",
        "pip install 'helix_megatron[deepspeed]'",
    ),
    Host(
        "helix serve",
        ("fastapi", "uvicorn", "pydantic", "prometheus-client"),
        ("helix_megatron.serving.app", "helix_megatron.serving.server"),
        "helix_megatron.serving.upstream:check",
        "pip install 'helix_megatron[serve]'",
    ),
)


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    what = "Tell what works in this environment, or whether Helix fits a checkout of Megatron-LM."
    parser = Parser(prog=program, description=what)
    checkout = "look at this checkout of Megatron-LM instead; nothing of it is imported"
    parser.add_argument("--megatron", type=INPUT_DIRECTORY, metavar="PATH", help=checkout)
    patch = (
        "with --megatron: print only a patch for its pretrain_gpt.py, for git apply --unidiff-zero"
    )
    parser.add_argument("--patch", action="store_true", help=patch)
    return parser


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Print the findings; 0 if all that is installed works, 1 if not, 2 for wrong arguments."""
    with exit_on_error(program):
        parser = build_parser(program)
        args = parser.parse_args(argv)
        if args.megatron is not None:
            from helix_megatron.megatron_lm.doctor import examine_checkout

            return examine_checkout(args.megatron, patch_only=args.patch, program=program)
        if args.patch:
            parser.error("--patch needs --megatron PATH, the checkout to be patched")
        return examine_environment(print)
    raise AssertionError("exit_on_error leaves by itself")


def examine_environment(say: Callable[[str], None]) -> int:
    """Say which versions are there, which hosts work and which kernels were found; 1 if something does not."""
    python = platform.python_version()
    tested = "tested" if python.rpartition(".")[0] in PYTHONS else f"tested: {', '.join(PYTHONS)}"
    say(f"helix_megatron {__version__}, Python {python} ({tested})\n")
    say(f"{'package':<15} {'installed':<14} tested")
    for package, versions in TESTED.items():
        found = found_version(package)
        outside = found is not None and not versions.contains(found)
        note = "   <- outside" if outside else ""
        say(f"{package:<15} {found or '-':<14} {versions.lowest} to {versions.newest}{note}")
    say("\nhosts")
    problems = []
    for host in HOSTS:
        state, found_problems = _examine_host(host)
        say(f"  {host.name:<15} {state}")
        problems += found_problems
    say(f"  {'Megatron-LM':<15} give --megatron PATH, a checkout")
    say("\ndevices and kernels")
    for line in _kernels():
        say(f"  {line}")
    if not problems:
        say("\nAll that is installed works.")
        return 0
    say("\nwhat to do")
    for problem in dict.fromkeys(problems):
        say(f"  {problem}")
    return 1


def _examine_host(host: Host) -> tuple[str, list[str]]:
    """(a word on its state, sentences on what does not work)."""
    absent = [package for package in host.packages if found_version(package) is None]
    if absent:
        return f"not installed ({', '.join(absent)}): {host.install}", []
    logging.disable(logging.WARNING)  # DeepSpeed says on import that there is no accelerator
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in host.modules:
                importlib.import_module(module)
            module, _, function = host.check.partition(":")
            problems = getattr(importlib.import_module(module), function)()
    except HelixError as error:
        problems = [str(error)]
    except Exception as error:  # whatever an unknown release does when it is imported
        versions = ", ".join(f"{package} {found_version(package)}" for package in host.packages)
        problems = [
            f"{host.name} cannot be imported with {versions}: {type(error).__name__}: {error}. Install tested "
            f"versions: {host.install}."
        ]
    finally:
        logging.disable(logging.NOTSET)
    return "works" if not problems else "does not work", problems


def _kernels() -> list[str]:
    """What computes here: devices, and the optional packages with what their absence means."""
    import torch

    from helix_megatron.core.kernels.installed import installed_kernels
    from helix_megatron.megatron.optional import available_backends

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        device = f"{count} × {names}, CUDA {torch.version.cuda}, NCCL {nccl}"
    else:
        device = "no CUDA device: ranks run on the CPU and exchange over gloo"
    return [
        device,
        installed_kernels().summary(),
        available_backends().summary(),
    ]


if __name__ == "__main__":
    sys.exit(main())
