"""Dependencies point down: what a module may import, and what it may know about processes.

    errors ← versions, hardware, tables
           ← layout, flags, outputs ← config ← arguments ← model
           ← observe, meter, collectives, masks, replicated, head_norm
           ← kernels, exchanges, caches
           ← attention, parallel_state, patching, needs
           ← checkpoint (files: no host)
           ← hosts: megatron, deepspeed, huggingface
           ← everything else (training, data, bench, …)

Imports are read from the source, those inside functions and under TYPE_CHECKING included.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from waiting import PROGRAM_LIMIT

ROOT = Path(__file__).parent.parent
PACKAGE = "helix_megatron"
HOSTS = ("megatron", "deepspeed", "huggingface")
# DeepSpeed has no layers of its own: it trains the models of the other two, which know nothing of it.
HOST_IMPORTS = {("deepspeed", "huggingface"), ("deepspeed", "megatron")}
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("versions", "hardware", "tables", "units"),
    ("layout", "flags", "outputs"),
    ("config",),
    ("arguments",),
    ("model",),
    ("observe", "meter", "collectives", "masks", "replicated", "head_norm", "device"),
    ("kernels", "exchanges", "caches"),
    ("attention", "parallel_state", "patching", "needs"),
    ("checkpoint",),
    ("run",),
    HOSTS,
)
# Applications, and the others that each may import: serving knows no planner, no graph, no training loop.
APPLICATIONS: dict[str, set[str]] = {
    "data": set(),
    "training": {"data"},
    "inference": {"data"},
    "serving": {"inference"},
    "plan": set(),
    "bench": {"training", "inference", "plan"},
    "graph": {"training", "bench"},
    "megatron_lm": set(),
}
TOP = len(LAYERS)
BELOW_HOSTS = {part for layer in LAYERS[:-1] for part in layer}
# Algorithms: they take groups as arguments, so these ways to find one out are closed to them.
ALGORITHMS = BELOW_HOSTS - {"parallel_state", "versions", "run"}
GLOBALS = {"WORLD", "get_rank", "get_world_size", "is_initialized", "_get_default_group", "environ"}
# What calls of collectives begin with, `collective` being a variable that holds one.
COLLECTIVES = ("dist.", "_all_gather", "_reduce_scatter", "collective")
WITHOUT_TORCH = {"errors", "hardware", "layout", "config", "arguments"}


def modules() -> dict[str, ast.Module]:
    """Dotted name below the package, or below its ground floor `core` → syntax tree."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__").removeprefix("core.")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Everything that is imported anywhere in a syntax tree, in full: `a.b.c` for `from a.b import c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(tree: ast.AST) -> set[str]:
    """The package's own parts that a module imports: `exchanges` for `helix_megatron.core.exchanges.choice`."""
    prefix = f"{PACKAGE}."
    own = (name.removeprefix(prefix) for name in imports(tree) if name.startswith(prefix))
    return {name.removeprefix("core.").split(".")[0] for name in own} - {"__version__"}


def imported_packages(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)}


def layer_of(part: str) -> int:
    return next((level for level, layer in enumerate(LAYERS) if part in layer), TOP)


MODULES = modules()


def test_the_source_was_read():
    """The tests below must not pass because they found nothing to look at."""
    assert len(MODULES) > 30
    for layer in LAYERS[:-1]:
        for part in layer:
            assert part in MODULES, f"{part} is gone or renamed: correct LAYERS"
    assert {"exchanges", "kernels", "layout", "masks", "errors"} <= imported_parts(
        MODULES["attention"]
    )
    assert "megatron" in imported_packages(MODULES["parallel_state"])  # inside functions
    assert "masks" in imported_parts(MODULES["kernels"])  # under TYPE_CHECKING


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_point_down(name):
    """An algorithm that imports its host cannot be used by another, nor tested without it."""
    part = name.split(".")[0]
    for imported in imported_parts(MODULES[name]) - {part}:
        assert layer_of(imported) <= layer_of(part), f"{name} imports {imported}, which is above it"
        both_hosts = {part, imported} <= set(HOSTS)
        assert not both_hosts or (part, imported) in HOST_IMPORTS, (
            f"host {part} imports host {imported}"
        )


@pytest.mark.parametrize("application", APPLICATIONS)
def test_applications_have_floors(application):
    """A server that imported the planner would start later, and break with it."""
    own = [name for name in MODULES if name.split(".")[0] == application]
    assert own, f"{application} is gone or renamed: correct APPLICATIONS"
    imported = set().union(*(imported_parts(MODULES[name]) for name in own)) - {application}
    assert imported & APPLICATIONS.keys() <= APPLICATIONS[application]


def test_parts_do_not_import_each_other_in_circles():
    """Parts of one layer may import each other, but then in one direction."""
    graph: dict[str, set[str]] = {}
    for name, tree in MODULES.items():
        if name:
            part = name.split(".")[0]
            graph.setdefault(part, set()).update(imported_parts(tree) - {part})
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("observe") < order.index("collectives") < order.index("attention")


def test_the_package_itself_imports_nothing():
    """`import helix_megatron` must cost nothing, whichever of its parts is wanted."""
    assert imported_packages(MODULES[""]) == set()


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] in ALGORITHMS])
def test_algorithms_know_no_host_and_no_process_global(name):
    """Below the hosts, groups are values: nothing may ask Megatron, torch's default group or the environment
    where it runs. Only parallel_state does, which is the hosts' own, and run, which starts processes."""
    tree = MODULES[name]
    assert not imported_packages(tree) & {"megatron", "deepspeed", "transformers"}
    assert "parallel_state" not in imported_parts(tree)
    if name in ("arguments", "checkpoint.command"):
        return  # RANK decides which process prints an error; a command chooses how its process allocates
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr not in GLOBALS, f"line {node.lineno} of {name} reads {node.attr}"
        if isinstance(node, ast.Name):
            assert node.id not in GLOBALS, f"line {node.lineno} of {name} reads {node.id}"


def test_every_collective_names_its_group():
    """Without `group=` a collective runs over all ranks of the world: right on two ranks, wrong on four."""
    calls = 0
    for name in sorted(MODULES):
        if name.split(".")[0] not in ALGORITHMS:
            continue
        for node in ast.walk(MODULES[name]):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called == "dist.get_backend" or not called.startswith(COLLECTIVES):
                continue
            assert "group" in {keyword.arg for keyword in node.keywords}, f"{name}: {called}"
            calls += 1
    assert calls >= 4


# Command lines of their own, help texts of flags, and commands of other programs in advice.
WITH_FLAGS = {
    "arguments",
    "checkpoint.command",
    "deepspeed.merge",
    "deepspeed.checkpoints",
    "flags",
    "huggingface.load",
    "model.expert_fields",
    "model.families.family",
    "model.fields",
    "run.rank_environment",
    "run.settings",
}


def test_below_the_command_line_nothing_speaks_of_flags():
    """Whoever calls from Python or writes a file has no flags: errors name settings (`Setting`)."""
    parts = BELOW_HOSTS | set(HOSTS)
    names = [name for name in MODULES if name.split(".")[0] in parts]
    spoken = {
        name: node.value
        for name in names
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"(?<![\w-])--[a-z]", node.value)
    }
    assert set(spoken) == WITH_FLAGS, spoken


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_configuration_imports_no_torch_anywhere(name):
    """The planner, the flags' help and wrong settings answer at once: torch takes seconds to import."""
    assert not imported_packages(MODULES[name]) & {"torch", "megatron"}


def test_a_command_is_chosen_without_numpy():
    """`helix --help` and a mistyped subcommand answer in the time that Python itself takes."""
    program = "import sys; from helix_megatron.cli import main; main(['--help']); print('numpy' in sys.modules)"
    answer = subprocess.check_output(
        [sys.executable, "-c", program], text=True, timeout=PROGRAM_LIMIT
    )
    assert answer.splitlines()[-1] == "False"


def test_layout_configuration_and_costs_work_without_torch():
    """The same at run time, as the source alone cannot prove it: costs of a layer, with torch absent."""
    program = """
import argparse, sys
import helix_megatron.core.layout, helix_megatron.config, helix_megatron.errors, helix_megatron.core.exchanges
from helix_megatron.arguments import add_helix_arguments
add_helix_arguments(argparse.ArgumentParser()).format_help()
layout = helix_megatron.config.HelixConfig(2).layout(64, 8, 128, 16)
shape = helix_megatron.core.exchanges.AttentionShape(layout, 2, 1024, 1024)
print(helix_megatron.core.exchanges.choose(shape).name)
helix_megatron.core.exchanges.explain(shape)
from helix_megatron.core.caches import DecodeShape, explain_cache_layout
explain_cache_layout(DecodeShape(layout, 64, 8192))
print(sorted({"torch", "megatron", "deepspeed"} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=PROGRAM_LIMIT,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:2] == ["gather-kv", "[]"]


def test_files_can_be_read_in_one_sitting():
    """Files of thousands of lines are the field's habit; 500 lines is where ours stop."""
    sources = [p for folder in (PACKAGE, "tests", "scripts") for p in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 60
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources}
    assert {path: lines for path, lines in lengths.items() if lines > 500} == {}
