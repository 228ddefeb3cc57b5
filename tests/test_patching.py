"""Replacing attributes of other packages: all or nothing, and back."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator

import pytest

from helix_megatron.errors import HelixError
from helix_megatron.patching import PatchTable, temporarily


class Base:
    def inherited(self) -> str:
        return "base"


class Derived(Base):
    own = "own"


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module to patch, holding a function, a constant and a class that inherits a method."""
    module = types.ModuleType("upstream")
    module.double = lambda x: 2 * x  # type: ignore[attr-defined]
    module.constant = 1  # type: ignore[attr-defined]
    module.Derived = Derived  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "upstream", module)
    yield module


def table() -> PatchTable:
    return PatchTable("torch", "the test")


def test_a_stand_in_gets_the_upstream_object(upstream: types.ModuleType) -> None:
    """Most stand-ins wrap what they replace."""
    patches = table()

    @patches.replace("upstream:double")
    def plus_one(double):  # type: ignore[no-untyped-def]
        return lambda x: double(x) + 1

    patches.install()
    patches.install()  # not wrapped twice
    assert upstream.double(3) == 7
    patches.uninstall()
    assert upstream.double(3) == 6
    assert not patches.installed


def test_an_inherited_attribute_is_removed_again(upstream: types.ModuleType) -> None:
    """Otherwise the derived class would keep a copy that hides later changes of its base."""
    patches = table()
    patches.replace("upstream:Derived.inherited", "upstream:Derived.own")(lambda old: "new")
    before = dict(vars(Derived))
    patches.install()
    assert (Derived.inherited, Derived.own, Base.inherited is Derived.inherited) == (
        "new",
        "new",
        False,
    )
    patches.uninstall()
    assert dict(vars(Derived)) == before
    assert Derived().inherited() == "base"


def test_added_attributes_are_left_alone_where_they_exist(upstream: types.ModuleType) -> None:
    """A version of upstream that has mended the fault must keep its own."""
    patches = table()
    patches.replace("upstream:constant", "upstream:forgotten", adds=True)(lambda old: 2)
    patches.install()
    assert (upstream.constant, upstream.forgotten) == (1, 2)
    patches.uninstall()
    assert upstream.constant == 1
    assert not hasattr(upstream, "forgotten")


def test_rows_of_other_versions_are_left_out(
    upstream: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a version of upstream does not have is no error there; what it has more of is not touched."""
    patches = table()
    monkeypatch.setattr("helix_megatron.patching.found_version", lambda package: "2.1.3")
    patches.replace("upstream:old", before=(2,))(lambda old: 2)
    patches.replace("upstream:new", since=(2, 2))(lambda old: 2)
    patches.replace("upstream:constant", since=(2, 1), before=(2, 2))(lambda old: 2)
    patches.install()
    assert upstream.constant == 2
    patches.uninstall()
    assert [patch.target for patch in patches.fitting((3,))] == ["upstream:new"]
    patches.replace("upstream:missing", since=(2,))(lambda old: 2)
    with pytest.raises(HelixError) as caught:
        patches.install()
    assert upstream.constant == 1
    assert str(caught.value).startswith(
        "torch 2.1.3 has no upstream.missing, which the test replaces. It is written for torch "
    )


@pytest.mark.parametrize(
    "target", ["upstream:missing", "upstream:Derived.missing.deeper", "no_such_module:attribute"]
)
def test_an_unknown_version_is_an_error_and_changes_nothing(
    upstream: types.ModuleType, target: str
) -> None:
    """A patch that misses its target must not pass in silence."""
    patches = table()
    patches.replace("upstream:constant")(lambda old: 2)
    patches.replace(target)(lambda old: None)
    with pytest.raises(HelixError) as caught:
        patches.install()
    assert upstream.constant == 1
    assert not patches.installed
    assert re.fullmatch(
        rf"torch \d\S* has no {target.replace(':', '.')}, which the test replaces. It is written for torch "
        r"\S+ to \S+: try pip install 'torch>=\S+,<\S+'\.",
        str(caught.value),
    )


def test_attributes_that_are_others_inside_a_block():
    """What the module had comes back, and what it had not is gone, also behind an error."""
    module = types.ModuleType("upstream")
    module.old = 1
    with pytest.raises(KeyError), temporarily(module, old=2, new=3):
        assert (module.old, module.new) == (2, 3)
        raise KeyError
    assert module.old == 1 and not hasattr(module, "new")
