"""`helix doctor --megatron PATH`: whether Helix fits a Megatron-LM checkout, told from its source alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from helix_megatron.arguments import exit_on_error
from helix_megatron.errors import HelixError
from helix_megatron.megatron_lm import cpu, hooks, patch
from helix_megatron.megatron_lm.source import bypasses, core_version, entry_point, find
from helix_megatron.megatron_lm.table import KNOWN, NEWEST, OLDEST, HookTable
from helix_megatron.versions import Version, dotted


def examine_checkout(path: str, *, patch_only: bool, program: str) -> int:
    """Print what fits a checkout and what does not, or only the patch of its script.

    Returns 0 if every hook of Helix fits, 1 if not; a path that is no checkout exits with 2.
    """
    with exit_on_error(program):
        checkout = Path(path)
        version = core_version(checkout)
        if patch_only:
            print(_patch(checkout), end="")
            return 0
        return _examine(checkout, version)
    raise AssertionError("exit_on_error ends the process")


def _examine(checkout: Path, version: tuple[int, ...]) -> int:
    print(f"Megatron-LM at {checkout}: megatron.core {dotted(version)}, {_familiar(version[:2])}.")
    problems = 0
    print("Hooks of Helix:")
    problems += _table(checkout, hooks.TABLE, version[:2])
    print("Stand-ins for a GPU, used only without CUDA:")
    without_gpu = _table(checkout, cpu.TABLE, version[:2]) + _cpu_runtime(checkout, version[:2])
    in_order, text = patch.state_of(checkout, version[:2])
    print(f"Patch of {patch.SCRIPT} (instead of the launcher, for forks): {text}.")
    problems += not in_order
    if version[:2] < OLDEST:
        problems += 1
    if without_gpu:
        print("It cannot run here without CUDA.")
    print("Helix fits this checkout." if not problems else "Helix does not fit this checkout.")
    return 1 if problems else 0


def _familiar(version: tuple[int, ...]) -> str:
    if version < OLDEST:
        return f"older than Helix's hooks know ({KNOWN})"
    if version > NEWEST:
        return f"newer than Helix's hooks know ({KNOWN})"
    return f"one that Helix's hooks know ({KNOWN})"


def _table(checkout: Path, table: HookTable, version: Version) -> int:
    """Print a table's hooks; the number of those that do not fit."""
    fitting = [hook for hook in table.hooks if hook.applies_to(version)]
    replaced = {target for hook in fitting for target in hook.targets}
    return _targets(
        checkout, [(hook.name, target) for hook in fitting for target in hook.targets], replaced
    )


def _cpu_runtime(checkout: Path, version: Version) -> int:
    """The same for what stands in for a GPU in megatron.core."""
    from helix_megatron.megatron import cpu_runtime, torch_adam

    patches = [*cpu_runtime.TABLE.fitting(version), *torch_adam.TABLE.fitting(version)]
    needed = [("CPU runtime", patch.target) for patch in patches if not patch.adds]
    return _targets(checkout, needed, {target for _, target in needed})


def _targets(checkout: Path, named: Iterable[tuple[str, str]], replaced: set[str]) -> int:
    problems = 0
    for name, target in named:
        if not target.startswith("megatron."):
            continue  # torch's, which is not in the checkout
        place = find(checkout, target)
        past = bypasses(checkout, target, replaced) if place else []
        if place is None:
            state, where = "missing", target.replace(":", ".")
        elif past:
            state, where = "bypassed", f"{place}, by {past[0]}, which imports it by name"
        else:
            state, where = "ok", str(place)
        problems += state != "ok"
        print(f"  {state:8} {name:22} {where}")
    return problems


def _patch(checkout: Path) -> str:
    script = checkout / patch.SCRIPT
    line = patch.applied_at(script) if script.is_file() else None
    if line is not None:
        raise HelixError(f"{script} is patched already, at line {line}. Nothing is to be applied.")
    entry = entry_point(script)
    if entry is None:
        raise HelixError(
            f'{script} has no line `if __name__ == "__main__":`, below which the patch belongs. Add by hand, '
            f"before anything of Megatron is called: {'; '.join(text.strip() for text in patch.LINES)}."
        )
    return patch.patch_text(entry)
