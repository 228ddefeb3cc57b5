"""Runs the library's own modelling tests with every model sharded, as a pytest plugin. Not a test by itself.

    CHECKOUT=PATH/TO/transformers          # at the tag of the installed version
    cd $CHECKOUT && HELIX_TRANSFORMERS=$CHECKOUT PYTHONPATH=PATH/TO/THIS/tests:PATH/TO/THIS \\
        torchrun --nproc-per-node 2 -m pytest -p upstream_transformers \\
        tests/models/llama/test_modeling_llama.py -k LlamaModelTest

Every rank runs all tests in the same order with the same random numbers. A model is sharded when its outermost
constructor returns, or, if it is built empty to be loaded, when `from_pretrained` returns; on sharded models
`save_pretrained` writes whole weights to each rank's directory. `NOT_APPLICABLE` names the tests that cannot
apply, with the reason; all others must pass. Rank 0 writes the outcome of each test to $HELIX_OUTCOMES.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import inspect
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

ACTIVE = "HELIX_TRANSFORMERS" in os.environ
SECONDS = 30  # that ranks wait for each other within a test

# Test (regular expression on its name) → why it cannot apply to a sharded model.
NOT_APPLICABLE: dict[str, str] = {
    "test_past_key_values_format": "it asks for whole heads in a cache, which holds segments",
    "test_can_set_attention_dynamically|test_assisted_decoding_matches_greedy_search": (
        "it sets another attention implementation, which a sharded model refuses"
    ),
    "test_resize_tokens_embeddings": "a sharded model refuses to resize its vocabulary",
    "test_resize_embeddings_untied": "a sharded model refuses to resize its vocabulary",
    "test_correct_missing_keys|test_from_pretrained_no_checkpoint": (
        "it loads the state dictionary of one model into another's constructor; of a sharded one it holds parts"
    ),
    "test_generate_compilation_all_outputs|test_capture_outputs_decorator": (
        "it asks for attention probabilities"
    ),
    "test_generate_compile_model_forward_fullgraph": (
        "torch.compile(fullgraph=True) cannot trace collectives over process groups"
    ),
}

WITHOUT_PROBABILITIES = (
    "test_custom_4d_attention_mask",
    "test_left_padding_compatibility",
    "test_eager_padding_matches_padding_free_with_position_ids",
    "test_sdpa_padding_matches_padding_free_with_position_ids",
)

_groups: Any = None
_depth = 0
_outcomes: dict[str, dict[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    if not ACTIVE:
        return
    sys.path.insert(0, os.environ["HELIX_TRANSFORMERS"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=30))
    if dist.get_rank() != 0:
        config.option.verbose = -2
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _shard_every_model()


def pytest_unconfigure() -> None:
    if ACTIVE and dist.is_initialized():
        dist.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not ACTIVE:
        return
    for item in items:
        suite = getattr(item, "cls", None)
        if suite is None:
            continue
        check = "_check_past_key_values_for_generate"
        if hasattr(suite, check) and check not in vars(suite):
            setattr(suite, check, _check_segments(getattr(suite, check)))
        for pattern, reason in NOT_APPLICABLE.items():
            if re.search(pattern, item.name):
                item.add_marker(pytest.mark.skip(reason=f"does not apply: {reason}"))
                break


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not ACTIVE:
        return (yield)
    global _groups
    from helix_megatron.huggingface import make_groups

    # New groups for each test: what one rank left unfinished must not reach into the next.
    dist.barrier()
    _groups = make_groups(dist.get_world_size(), _segments(), timeout_minutes=SECONDS / 60)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if ACTIVE:
        _seed()
        # The suite's own switch for models that return no attention probabilities; it also leaves out tests
        # that need none.
        item.cls.has_attentions = item.name in WITHOUT_PROBABILITIES  # type: ignore[attr-defined]
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not ACTIVE or (report.when != "call" and report.passed):
        return
    reason = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
    elif report.failed:
        reason = str(report.longrepr).strip().splitlines()[-1]
    found = {"outcome": report.outcome, "reason": reason}
    test = report.nodeid.split("::")[-1]  # once more for each of its subtests
    _outcomes[test] = max(_outcomes.get(test, found), found, key=_badness)


def pytest_sessionfinish() -> None:
    if not ACTIVE:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, _outcomes)
    if dist.get_rank() == 0 and "HELIX_OUTCOMES" in os.environ:
        merged = {
            test: max((ranks.get(test, outcome) for ranks in everyone), key=_badness)
            for test, outcome in _outcomes.items()
        }
        Path(os.environ["HELIX_OUTCOMES"]).write_text(json.dumps(merged, indent=1))


def _badness(outcome: dict[str, str]) -> int:
    return ("skipped", "passed", "failed").index(outcome["outcome"])


def _segments() -> int:
    return int(os.environ.get("HELIX_SEGMENTS", "2"))


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    common = sys.modules.get("tests.test_modeling_common")
    if common is not None:
        common.global_rng.seed(0)  # the suite's own generator of inputs


# -------------------------------------------------------------------- sharding models


def _shard_every_model() -> None:
    from transformers import PreTrainedModel
    from transformers.models.llama import modeling_llama

    for name in dir(modeling_llama):
        kind = getattr(modeling_llama, name)
        if isinstance(kind, type) and issubclass(kind, modeling_llama.LlamaPreTrainedModel):
            kind.__init__ = _sharding_constructor(kind.__init__)
    for name in ("from_pretrained", "_from_config"):
        own = getattr(PreTrainedModel, name).__func__
        setattr(PreTrainedModel, name, classmethod(_sharding_loader(own)))
    torch.nn.utils.clip_grad_norm_ = _clip_by_the_norm_of_the_whole


def _sharding_constructor(own: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(own)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        with _nested():
            own(self, *args, **kwargs)
        if _depth == 0 and not any(p.is_meta for p in self.parameters()):
            _shard(self)

    return init


def _sharding_loader(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def load(cls: type, *args: Any, **kwargs: Any) -> Any:
        with _nested():
            loaded = own(cls, *args, **kwargs)
        if _depth == 0:
            _shard(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    return load


@contextlib.contextmanager
def _nested() -> Iterator[None]:
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def _shard(model: Any) -> None:
    from helix_megatron.huggingface import shard

    if model.config.model_type != "llama":
        return
    shard(
        model,
        {
            "intra_head_parallel_size": _segments(),
            "query_layout": os.environ.get("HELIX_QUERY_LAYOUT", "auto"),
        },
        tensor_group=_groups.tensor,
        intra_head_group=_groups.intra_head,
    )
    model.save_pretrained = functools.partial(_save, model)


def _clip_by_the_norm_of_the_whole(parameters: Any, max_norm: float) -> torch.Tensor:
    from helix_megatron.huggingface import clip_grad_norm_

    return clip_grad_norm_(parameters, max_norm, _groups.tensor)


def _check_segments(own: Callable[..., None]) -> Callable[..., None]:
    """The suite's check of a cache's shapes, told what a rank holds: g/n heads of d/m dimensions."""

    @functools.wraps(own)
    def check(*args: Any, **kwargs: Any) -> None:
        call = inspect.signature(own).bind(*args, **kwargs)
        m, config = _segments(), call.arguments["config"]
        held = call.arguments["config"] = copy.copy(config)
        held.head_dim = config.head_dim // m
        held.num_key_value_heads = config.num_key_value_heads * m // dist.get_world_size()
        own(*call.args, **call.kwargs)

    return check


def _save(model: Any, directory: str, **kwargs: Any) -> None:
    """Whole weights, in the directory of every rank: each has a temporary one of its own."""
    from helix_megatron.huggingface import save_pretrained

    written = [str(directory)]
    save_pretrained(model, directory)
    dist.broadcast_object_list(written, group=_groups.tensor, group_src=0)
    if dist.get_rank() != 0:
        shutil.copytree(written[0], directory, dirs_exist_ok=True)
    dist.barrier(group=_groups.tensor)
