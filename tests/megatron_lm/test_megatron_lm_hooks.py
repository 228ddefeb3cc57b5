"""The hooks into Megatron-LM one by one: applied once, undone, refused where they do not fit.

megatron.training is a stand-in (tests/mini_megatron_lm.py); megatron.core is the installed package.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import mini_megatron_lm
import pytest
import torch

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.megatron_lm import cpu, hooks, settings
from helix_megatron.megatron_lm.table import NEWEST, HookTable, found_version
from helix_megatron.versions import dotted


@pytest.fixture
def host(tmp_path: Path) -> Iterator[types.SimpleNamespace]:
    """The stand-in's modules, with the hooks of Helix installed."""
    mini_megatron_lm.write(tmp_path)
    with mini_megatron_lm.on_path(tmp_path):
        from megatron.training import arguments, initialize, training

        hooks.TABLE.install()
        try:
            yield types.SimpleNamespace(
                arguments=arguments, initialize=initialize, training=training
            )
        finally:
            hooks.TABLE.uninstall()
            settings._recorded.clear()


def arguments(**given: object) -> argparse.Namespace:
    """Validated arguments of a model of 4 heads on 4 tensor parallel ranks."""
    values = {
        "intra_head_parallel_size": 2,
        "helix_attention": "exact",
        "helix_exchange": "auto",
        "helix_query_layout": "auto",
        "helix_kernel": "auto",
        "helix_dry_run": False,
        "helix_layout_free_init": False,
        "num_attention_heads": 4,
        "num_query_groups": 1,
        "group_query_attention": False,
        "kv_channels": 8,
        "tensor_model_parallel_size": 4,
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "rotary_interleaved": False,
        "seed": 7,
        "distributed_timeout_minutes": 10,
        "save": None,
        "load": None,
    }
    return argparse.Namespace(**values | given)


# ---------------------------------------------------------------- the table


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("upstream")
    module.old, module.new = (lambda: "old"), (lambda: "new")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "upstream", module)
    return module


def wrapped(upstream):
    """Adds a word."""
    return lambda: upstream() + " and ours"


@pytest.mark.parametrize("since_before", [((0, 99), None), ((0, 16), (0, 16))])
def test_a_hook_of_other_versions_is_left_out(upstream, since_before) -> None:
    """What a version does not have is not missed there, and what it has more of is not touched."""
    table = HookTable("the hooks of this test")
    since, before = since_before
    table.hook("a", "upstream:gone", since=since, before=before)(wrapped)
    table.hook("b", "upstream:new")(wrapped)
    table.install()
    table.install()  # once
    assert (upstream.old(), upstream.new()) == ("old", "new and ours")
    table.uninstall()
    assert upstream.new() == "new"


def test_a_hook_that_cannot_be_applied_names_the_versions(upstream) -> None:
    """Nothing is swallowed: found and known versions, the name, and what to do; nothing is replaced."""
    table = HookTable("the hooks of this test")
    table.hook("a", "upstream:new")(wrapped)
    table.hook("b", "upstream:gone")(wrapped)
    with pytest.raises(HelixError) as caught:
        table.install()
    assert str(caught.value).startswith(f"megatron.core {dotted(found_version())} at ")
    assert str(caught.value).endswith(
        "has no upstream.gone, which the hooks of this test replace. They are written for megatron.core 0.16 "
        "to 0.20: see docs/megatron-lm.md, and `helix doctor --megatron PATH` for what fits."
    )
    assert upstream.new() == "new"


def test_a_module_that_cannot_be_imported_says_why(upstream) -> None:
    """A missing package of the user's is another thing than an unknown version."""
    table = HookTable("the hooks of this test")
    table.hook("a", "upstream_needs_triton:name")(wrapped)
    with pytest.raises(HelixError, match=r"\(No module named 'upstream_needs_triton'\)$"):
        table.install()


@pytest.mark.parametrize(("minor", "known"), [(15, False), (NEWEST[1] + 1, True)])
def test_versions_outside_the_known_range(upstream, monkeypatch, minor, known) -> None:
    """Older ones are refused, newer ones tried, with a warning."""
    from megatron.core import package_info

    monkeypatch.setattr(package_info, "MINOR", minor)
    table = HookTable("the hooks of this test")
    table.hook("a", "upstream:new")(wrapped)
    if known:
        with pytest.warns(
            UserWarning, match=r"megatron.core 0.21.[0-9] at .* is newer than what the hooks of"
        ):
            table.install()
        table.uninstall()
    else:
        with pytest.raises(
            HelixError, match=r"0.15.[0-9] at .* is older .* Check out core_v0.16.1 or later"
        ):
            table.install()


@pytest.mark.parametrize("table", [hooks.TABLE, cpu.TABLE])
def test_every_hook_says_what_it_changes_and_where(table) -> None:
    """The dry run and the doctor print these lines."""
    assert len(table.hooks) > 7
    for hook in table.hooks:
        assert 20 < len(hook.change) < 110 and hook.change.endswith("."), hook
        assert hook.range.startswith("0.1")


# ---------------------------------------------------------------- settings


def test_settings_of_arguments() -> None:
    """The layout is the configuration's: MHA without --group-query-attention, rotary only where used."""
    given = settings.settings_of(arguments())
    assert not given.causal_masks_only, "documents may be reset, for all that the arguments say"
    assert settings.settings_of(arguments(reset_attention_mask=False)).causal_masks_only
    assert (given.helix, given.rotary_percent, given.seed) == (HelixConfig(2), 0.5, 7)
    assert given.layout is not None
    assert (given.layout.num_kv_heads, given.layout.segments, given.layout.rotary_dim) == (4, 2, 4)
    given = settings.settings_of(
        arguments(
            position_embedding_type="learned_absolute",
            group_query_attention=True,
            tensor_model_parallel_size=2,
        )
    )
    assert given.layout is not None
    assert (given.rotary_percent, given.layout.num_kv_heads, given.layout.rotary) == (
        0.0,
        1,
        "none",
    )
    stock = settings.settings_of(arguments(intra_head_parallel_size=1, use_legacy_models=True))
    assert stock.layout is None and not stock.helix.active


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"position_embedding_type": "mrope"},
            "--position-embedding-type mrope does not work with --intra-head-parallel-size 2. Valid: "
            "learned_absolute, rope, none.",
        ),
        (
            {"use_legacy_models": True},
            "--use-legacy-models does not work with --intra-head-parallel-size 2: legacy models have their own "
            "attention. Leave it out.",
        ),
        (
            {"ckpt_format": "torch", "save": "somewhere"},
            "--ckpt-format torch writes what one rank holds, which depends on --intra-head-parallel-size; only "
            "torch_dist can be read at another layout. Set --ckpt-format torch_dist.",
        ),
        (
            {"gtp_weight_remat_size": 2},
            "--tensor-parallel-num-weight-shards above the tensor parallel size has not been shown to work "
            "with --intra-head-parallel-size 2. Leave it out.",
        ),
        (
            {"helix_layout_free_init": True, "init_model_with_meta_device": True},
            "--helix-layout-free-init draws weights while the model is built, and "
            "--init-model-with-meta-device builds it without weights. Leave one out.",
        ),
    ],
)
def test_what_does_not_work_is_refused_by_name(given, message) -> None:
    """Each in one sentence, with the way out."""
    with pytest.raises(HelixError) as caught:
        settings.settings_of(arguments(**given))
    assert str(caught.value) == message


def test_without_arguments_everything_is_stock(monkeypatch) -> None:
    """A library that builds a configuration without the script's arguments must not be touched."""
    settings._recorded.clear()
    assert not settings.current().helix.active
    for argument in ("--intra-head-parallel-size", "--intra-head-parallel-size=2"):
        monkeypatch.setattr(sys, "argv", ["script", argument])
        with pytest.raises(HelixError, match="did not let Megatron-LM validate its arguments"):
            settings.current()


# ---------------------------------------------------------------- the hooks


def test_flags_and_validation_meet_their_callers(host, monkeypatch) -> None:
    """Also where upstream has imported the function by name, as initialize.py has up to 0.17."""
    monkeypatch.setattr(
        sys, "argv", ["x", "--tensor-model-parallel-size", "4", "--intra-head-parallel-size", "2"]
    )
    args = host.arguments.parse_args()
    assert (args.intra_head_parallel_size, args.helix_exchange, args.helix_dry_run) == (
        2,
        "auto",
        False,
    )
    by_name = getattr(host.initialize, "validate_args", None)
    assert (by_name is None) == (found_version() >= (0, 18))
    for validate in filter(None, (host.arguments.validate_args, by_name)):
        settings._recorded.clear()
        assert validate(args).validated
        assert settings.current().helix == HelixConfig(2)
    args.num_attention_heads = 3
    with pytest.raises(SystemExit) as caught:
        host.arguments.validate_args(args)
    assert caught.value.code == 2


def test_the_configuration_is_as_upstream_makes_it(host) -> None:
    """Only what Megatron would refuse differs; nothing else, with m = 1 or after the check."""
    plain = host.arguments.core_transformer_config_from_args(
        arguments(num_layers=1, hidden_size=32, tensor_model_parallel_size=1)
    )
    settings.record(settings.settings_of(arguments(tensor_model_parallel_size=8)))
    cut = host.arguments.core_transformer_config_from_args(
        arguments(num_layers=1, hidden_size=32, tensor_model_parallel_size=8)
    )
    assert (cut.helix, cut.rotary_percent) == (HelixConfig(2), 0.5)
    assert not hasattr(plain, "helix")
    differing = {
        name for name in vars(plain) if repr(getattr(plain, name)) != repr(getattr(cut, name))
    }
    assert {n for n in differing if "init_method" not in n} == {
        "tensor_model_parallel_size",
        "expert_tensor_parallel_size",
    }
    settings._recorded.clear()
    with pytest.raises(ValueError, match="num_attention_heads"):  # upstream's own
        host.arguments.core_transformer_config_from_args(
            arguments(num_layers=1, hidden_size=32, tensor_model_parallel_size=8)
        )


def test_attention_outside_of_gptmodel_is_refused(host) -> None:
    """Other scripts' models would train with stock attention, and nobody would know."""
    from megatron.core.transformer.attention import CrossAttention

    settings.record(settings.settings_of(arguments()))
    with pytest.raises(HelixError) as caught:
        CrossAttention(None, None, 1)
    assert str(caught.value) == (
        "--intra-head-parallel-size 2 was given, and this model builds CrossAttention outside of GPTModel "
        "and HybridModel, where heads are not cut. Use it with pretrain_gpt.py or pretrain_hybrid.py, or leave "
        "--intra-head-parallel-size at 1."
    )


def test_a_stock_checkpoint_does_not_take_away_the_head_groups_state(host) -> None:
    """Its random states lack ours, and upstream replaces all of them when it loads."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    from helix_megatron.megatron.random import HEAD_GROUP_STATE

    tracker = CudaRNGStatesTracker()
    tracker.states_[HEAD_GROUP_STATE] = ours = torch.get_rng_state()
    tracker.set_states({"default": torch.get_rng_state()})
    assert set(tracker.get_states()) == {"default", HEAD_GROUP_STATE}
    assert tracker.get_states()[HEAD_GROUP_STATE] is ours
    tracker.set_states({HEAD_GROUP_STATE: "theirs"})
    assert tracker.get_states() == {HEAD_GROUP_STATE: "theirs"}
    tracker.states_ = {}
    tracker.set_states({"default": 1})
    assert tracker.get_states() == {"default": 1}


def test_a_restart_after_a_fault_forgets_the_groups(host, monkeypatch) -> None:
    """training.py imported the function by name; groups left over would be an error at the next start."""
    from helix_megatron import parallel_state

    forgotten = []
    monkeypatch.setattr(parallel_state, "destroy_intra_head_parallel", lambda: forgotten.append(1))
    host.training.destroy_global_state()
    assert forgotten == [1]


def test_the_cpu_set_is_complete_or_absent(host) -> None:
    """A stand-in that cannot be placed must leave neither the others nor cpu_runtime behind."""
    from helix_megatron.megatron import cpu_runtime

    initialize = host.training.initialize_megatron
    del host.training.initialize_megatron
    before = torch.cuda.device_count
    with pytest.raises(
        HelixError,
        match=r"has no megatron.training.training.initialize_megatron, which the CPU stand-ins",
    ):
        cpu.install()
    assert torch.cuda.device_count is before
    assert not cpu_runtime.is_installed() and not cpu.TABLE.installed
    host.training.initialize_megatron = initialize
    assert cpu.install() and cpu.install()
    try:
        assert torch.cuda.device_count() == 1
        if found_version() < (0, 17):
            sys.modules["megatron.legacy.fused_kernels"].load(None)
    finally:
        cpu.uninstall()
    assert torch.cuda.device_count is before and not cpu_runtime.is_installed()


def test_cpu_defaults_yield_to_flags(host) -> None:
    """--distributed-backend is gloo unless one is given; arguments that a version lacks are not invented."""
    stand_in = next(h.stand_in for h in cpu.TABLE.hooks if h.name == "CPU defaults")
    parser = stand_in(host.arguments.add_megatron_arguments)(argparse.ArgumentParser())
    args = parser.parse_args([])
    assert (args.distributed_backend, args.transformer_impl) == ("gloo", "local")
    assert not hasattr(args, "apply_rope_fusion")
    assert parser.parse_args(["--distributed-backend", "nccl"]).distributed_backend == "nccl"
