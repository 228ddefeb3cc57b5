"""What NVIDIA's unit tests need to run without a GPU, with stock attention or the Helix layer: a pytest plugin.

`upstream_tests.py` loads it in place of their conftest.py, which downloads data and wants NCCL. With
`HELIX_SEGMENTS` m above 1 every tensor parallel size that m divides gets heads cut in m segments: by the hooks
of the launcher where a test builds a model, and in the class that the test calls where it builds a layer.
"""

from __future__ import annotations

import datetime
import faulthandler
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helix_megatron.config import HelixConfig
from helix_megatron.megatron_lm import cpu, hooks, settings

SEGMENTS = int(os.environ["HELIX_SEGMENTS"])
FOLDER = Path(os.environ["HELIX_FOLDER"])
SECONDS = int(os.environ["HELIX_TEST_SECONDS"])
TIMEOUT = datetime.timedelta(minutes=3)  # ends a test of which one rank has failed
_STDERR = os.fdopen(os.dup(2), "w")  # pytest keeps what a test writes to the other one
_outcomes: dict[str, list[Any]] = {}
"""By name of the test: passed, skipped or failed; why not passed; whether it built a Helix layer."""
_built: list[Any] = []
_beyond_megatrons_core: list[bool] = []
"""Not empty in a test of context parallelism or packed sequences, which Megatron's core attention refuses."""


def pytest_configure(config: pytest.Config) -> None:
    """Put everything in place before a test module is imported."""
    for marker in ("internal", "flaky", "flaky_in_dev", "experimental"):
        config.addinivalue_line("markers", f"{marker}: one of Megatron-LM's")
    cpu.install()
    init_process_group = torch.distributed.init_process_group

    def over_gloo(backend: str | None = None, **named: Any) -> None:
        init_process_group("gloo", **{**named, "timeout": TIMEOUT})

    torch.distributed.init_process_group = over_gloo
    _local_specs()
    if SEGMENTS > 1:
        hooks.TABLE.install()
        _cut_where_possible()


def _local_specs() -> None:
    """Layers of Transformer Engine are megatron-core's own, with our core attention where that has none."""
    from megatron.core.models.gpt import gpt_layer_specs

    from helix_megatron.megatron.core_attention import context_spec
    from helix_megatron.megatron.norms import use_available_norms

    def local_spec(**given: Any) -> Any:
        spec = use_available_norms(gpt_layer_specs.get_gpt_layer_local_spec(**given))
        return context_spec(spec) if _beyond_megatrons_core else spec

    gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec = local_spec
    gpt_layer_specs.get_gpt_layer_with_transformer_engine_submodules = lambda **given: (
        local_spec(**given).submodules
    )


def _cut_where_possible() -> None:
    """A test's tensor parallel size decides, anew whenever it makes groups."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel

    from helix_megatron.megatron.self_attention import VirtualSelfAttention

    make_groups, build = parallel_state.initialize_model_parallel, GPTModel.__init__
    build_layer = VirtualSelfAttention.__init__

    @functools.wraps(make_groups)
    def initialize_model_parallel(size: int = 1, *args: Any, **named: Any) -> None:
        size = named.pop("tensor_model_parallel_size", size)
        settings.record(settings.Settings(HelixConfig(1 if size % SEGMENTS else SEGMENTS)))
        make_groups(size, *args, **named)

    @functools.wraps(build)
    def __init__(self: Any, config: Any, *args: Any, **named: Any) -> None:
        # The tests change the tensor parallel size of a configuration that exists.
        config.helix, config.rotary_percent = settings.current().helix, 0.0
        build(self, config, *args, **named)

    @functools.wraps(build_layer)
    def noted(self: Any, *args: Any, **named: Any) -> None:
        build_layer(self, *args, **named)
        _built.append(type(self))

    parallel_state.initialize_model_parallel = initialize_model_parallel
    GPTModel.__init__, VirtualSelfAttention.__init__ = __init__, noted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`SelfAttention` in a test is the Helix layer where heads are cut."""
    from megatron.core.transformer.attention import SelfAttention

    from helix_megatron.megatron.self_attention import HelixSelfAttention

    class Either(type):
        def __call__(cls, *args: Any, **named: Any) -> Any:
            layer = HelixSelfAttention if settings.current().helix.active else SelfAttention
            return layer(*args, **named)

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, SelfAttention)

    if SEGMENTS > 1:
        for module in {item.module for item in items if isinstance(item, pytest.Function)}:
            if hasattr(module, "SelfAttention"):
                module.SelfAttention = Either("SelfAttention", (), {})


@pytest.fixture(scope="session")
def tmp_path_dist_ckpt() -> Path:
    """Their name for a folder that all ranks see."""
    return FOLDER / "checkpoints"


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test begins with stock attention, until it makes groups."""
    settings.record(settings.Settings())
    _built.clear()
    asked = item.callspec.params if hasattr(item, "callspec") else {}
    beyond = asked.get("cp", 1) > 1 or asked.get("sequence_packing", False)
    _beyond_megatrons_core[:] = [True] * beyond
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=_STDERR)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what became of each test, and the last line of a failure."""
    name = report.nodeid.partition("::")[2]
    if report.outcome != "passed":
        why = report.longrepr
        text = why[-1].removeprefix("Skipped: ") if isinstance(why, tuple) else str(why)
        text = getattr(getattr(why, "reprcrash", None), "message", text)
        _outcomes[name] = [report.outcome, text.strip().splitlines()[0], bool(_built)]
    elif report.when == "call":
        _outcomes[name] = ["passed", "", bool(_built)]
    if report.when == "teardown":
        faulthandler.cancel_dump_traceback_later()
        whole = FOLDER / f"rank-{os.environ['RANK']}.json"
        part = whole.with_suffix(".part")
        part.write_text(json.dumps(_outcomes))
        part.replace(whole)  # a rank may end at any time
        if os.environ["RANK"] == "0":
            print(f"m = {SEGMENTS}: {name}: {_outcomes[name][0]}", file=_STDERR, flush=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Failures are for the table that all ranks' outcomes make, and no reason to end other ranks."""
    session.exitstatus = 0
