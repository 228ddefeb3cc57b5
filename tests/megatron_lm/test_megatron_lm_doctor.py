"""`helix doctor --megatron PATH` and the patches for forks, on checkouts made of stubs, never imported."""

from __future__ import annotations

import os
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from waiting import PROGRAM_LIMIT

from helix_megatron import cli, doctor
from helix_megatron.errors import HelixError
from helix_megatron.megatron import cpu_runtime, torch_adam
from helix_megatron.megatron_lm import cpu, hooks, patch, source

ROOT = Path(__file__).parents[2]
SCRIPT = 'import time\n\n\ndef model():\n    pass\n\n\nif __name__ == "__main__":\n    model()\n'


def checkout(folder: Path, version: tuple[int, int] = (0, 16), without: str = "") -> Path:
    """A checkout in which every hook point of a version is defined, except one."""
    targets = [
        target
        for hook in (*hooks.TABLE.hooks, *cpu.TABLE.hooks)
        if hook.applies_to(version)
        for target in hook.targets
    ]
    targets += [p.target for t in (cpu_runtime.TABLE, torch_adam.TABLE) for p in t.fitting(version)]
    modules: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for target in targets:
        module, _, attribute = target.partition(":")
        if module.startswith("megatron.") and target != without:
            parent, _, name = attribute.rpartition(".")
            modules[module][parent].append(name)
    for module, parents in modules.items():
        lines = []
        for parent, names in parents.items():
            lines += [f"class {parent}:"] if parent else []
            indent = "    " if parent else ""
            single = [name for name in dict.fromkeys(names) if parent or name not in parents]
            lines += [f"{indent}def {name}(): ..." for name in single]
        write(folder, module.replace(".", "/") + ".py", "\n".join(lines) + "\n")
    write(
        folder,
        "megatron/core/package_info.py",
        f"MAJOR = {version[0]}\nMINOR = {version[1]}\nPATCH = 2\nPRE_RELEASE = ''\n",
    )
    padding = patch.ENTRY_POINTS.get(version, 8) - 8
    write(folder, "pretrain_gpt.py", "\n" * padding + SCRIPT)
    return folder


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def examine(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    source._tree.cache_clear()
    code = cli.main(["doctor", "--megatron", str(folder)])
    return code, capsys.readouterr().out


# ---------------------------------------------------------------- the doctor


@pytest.mark.parametrize("version", sorted(patch.ENTRY_POINTS))
def test_a_checkout_that_fits(tmp_path, capsys, version) -> None:
    """Status 0, with a line for every hook point and the patch of this version."""
    code, text = examine(checkout(tmp_path, version), capsys)
    assert code == 0, text
    lines = text.splitlines()
    assert lines[0] == (
        f"Megatron-LM at {tmp_path}: megatron.core {version[0]}.{version[1]}.2, one that Helix's hooks know "
        "(0.16 to 0.20)."
    )
    assert "  ok       flags                  megatron/training/arguments.py:1" in lines
    assert f"not applied; patches/core_v0.{version[1]}.patch fits." in text
    assert lines[-1] == "Helix fits this checkout."
    assert ("fused_kernels" in text) == (version == (0, 16))


@pytest.mark.parametrize(
    ("without", "line", "status"),
    [
        (
            "megatron.core.models.gpt.gpt_model:GPTModel.__init__",
            "  missing  model                  megatron.core.models.gpt.gpt_model.GPTModel.__init__",
            1,
        ),
        (
            "megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
            "  missing  CPU runtime            megatron.core.tensor_parallel.mappings._gather_along_first_dim",
            0,
        ),
    ],
)
def test_a_hook_point_that_is_gone(tmp_path, capsys, without, line, status) -> None:
    """A hook of Helix that is missing is status 1; one for the CPU is said, and matters only there."""
    code, text = examine(checkout(tmp_path, without=without), capsys)
    assert (code, line in text.splitlines()) == (status, True), text
    assert ("It cannot run here without CUDA." in text) == (status == 0)
    assert ("Helix does not fit this checkout." in text) == (status == 1)


def test_a_function_that_was_imported_by_name_is_found(tmp_path, capsys) -> None:
    """The worst case: the hook is there and never called."""
    checkout(tmp_path)
    write(
        tmp_path,
        "megatron/training/new_entry.py",
        "from megatron.training.arguments import validate_args\n\n\ndef go():\n    validate_args()\n",
    )
    code, text = examine(tmp_path, capsys)
    assert code == 1
    assert "bypassed validation" in text
    assert "by megatron/training/new_entry.py:1, which imports it by name" in text
    write(
        tmp_path,
        "megatron/training/new_entry.py",
        "def go():\n    from megatron.training.arguments import validate_args\n    validate_args()\n",
    )
    assert examine(tmp_path, capsys)[0] == 0


@pytest.mark.parametrize(("minor", "words", "status"), [(15, "older", 1), (21, "newer", 0)])
def test_versions_that_the_hooks_do_not_know(tmp_path, capsys, minor, words, status) -> None:
    """An older one is refused at start, so the doctor must not call it fitting."""
    code, text = examine(checkout(tmp_path, (0, 16)), capsys)
    write(tmp_path, "megatron/core/package_info.py", f"MAJOR = 0\nMINOR = {minor}\nPATCH = 0\n")
    if minor == 21:
        checkout(tmp_path, (0, 21))
    code, text = examine(tmp_path, capsys)
    assert code == status
    assert f"{words} than Helix's hooks know (0.16 to 0.20)" in text


def test_what_is_no_checkout_is_status_2(tmp_path, capsys) -> None:
    """A mistyped path must not read as `does not fit`."""
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--megatron", str(tmp_path)])
    assert caught.value.code == 2
    text = " ".join(capsys.readouterr().err.split())
    assert text == (
        f"helix doctor: error: {tmp_path} has no megatron/core/package_info.py, so it is no checkout of "
        "Megatron-LM. Give the folder that holds pretrain_gpt.py and megatron/."
    )


# ---------------------------------------------------------------- reading the source


def test_where_a_name_is_defined(tmp_path) -> None:
    """Upstream defines names under `if` and `try`, twice, by import, by annotation, in a package's __init__."""
    write(
        tmp_path,
        "pack/__init__.py",
        "from .inner import first as renamed\n"
        "try:\n    import fast as speed\nexcept ImportError:\n    speed = None\n"
        "value: int = 1\n"
        "class Thing:\n    def method(self): ...\n    def method(self): ...\n"
        "if value:\n    def function(): ...\n",
    )
    write(tmp_path, "pack/inner.py", "a = b = 1\n")
    lines = {
        "pack:renamed": 1,
        "pack:value": 6,
        "pack:Thing.method": 9,
        "pack:function": 11,
        "pack.inner:b": 1,
    }
    for target, line in lines.items():
        place = source.find(tmp_path, target)
        assert place is not None and place.line == line, target
    assert str(source.find(tmp_path, "pack.inner:a")) == "pack/inner.py:1"
    assert source.find(tmp_path, "pack:speed") is not None
    for target in ("pack:first", "pack:Thing.other", "pack:value.method", "pack.nowhere:x"):
        assert source.find(tmp_path, target) is None


def test_source_that_is_no_python(tmp_path) -> None:
    """A checkout in the middle of a merge."""
    write(tmp_path, "broken.py", "<<<<<<< HEAD\n")
    with pytest.raises(HelixError, match=r"broken.py cannot be read as Python"):
        source.find(tmp_path, "broken:x")


# ---------------------------------------------------------------- patches


@pytest.mark.parametrize("version", sorted(patch.ENTRY_POINTS))
def test_the_patches_apply_and_are_recognised(tmp_path, capsys, version) -> None:
    """The files in patches/ are those of the code; git takes them, and the script then installs Helix first."""
    file = ROOT / "patches" / patch.patch_name(version)
    assert file.read_text() == patch.patch_text(patch.ENTRY_POINTS[version])
    added = file.read_text().splitlines()[3:]
    assert added and all(line.startswith("+") and "helix_megatron" in line for line in added)
    checkout(tmp_path, version)
    for check in (["--check"], []):
        subprocess.run(
            ["git", "apply", "--unidiff-zero", *check, str(file)],
            cwd=tmp_path,
            check=True,
            timeout=PROGRAM_LIMIT,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
        )
    script = (tmp_path / "pretrain_gpt.py").read_text()
    assert '__main__":\n    import helix_megatron.megatron_lm' in script
    assert script.endswith("    helix_megatron.megatron_lm.install()\n    model()\n")
    code, text = examine(tmp_path, capsys)
    assert code == 0 and f"applied at line {patch.ENTRY_POINTS[version] + 2}." in text


def test_a_patch_is_made_for_a_fork_that_has_moved(tmp_path, capsys) -> None:
    """A zero-context patch goes where its line number says, right or wrong: so the number must be asked for."""
    checkout(tmp_path)
    script = tmp_path / "pretrain_gpt.py"
    script.write_text("import os\n" + SCRIPT)
    code, text = examine(tmp_path, capsys)
    assert code == 0
    assert (
        "none of the released ones fits, since the script begins to run at line 9. --patch prints"
        in text
    )
    assert doctor.main(["--megatron", str(tmp_path), "--patch"]) == 0
    made = capsys.readouterr().out
    assert made == patch.patch_text(9)


def test_a_patch_in_the_wrong_place_is_told(tmp_path, capsys) -> None:
    """In the middle of a function the hooks would come too late or never."""
    checkout(tmp_path)
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(SCRIPT.replace("    pass\n", "    pass\n" + "\n".join(patch.LINES) + "\n"))
    code, text = examine(tmp_path, capsys)
    assert code == 1
    assert (
        "applied at line 7, and the script begins to run at line 10. Move the lines to below line 10."
        in text
    )
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--megatron", str(tmp_path), "--patch"])
    assert caught.value.code == 2
    assert "is patched already, at line 7" in " ".join(capsys.readouterr().err.split())
