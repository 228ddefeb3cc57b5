"""The hooks of Helix into Megatron-LM, in the order in which a run meets them.

File names in the docstrings are those of core_v0.16.1. Undo all with `helix_megatron.megatron_lm.uninstall()`.
With intra-head parallel size 1 every stand-in calls upstream and nothing else.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from helix_megatron.arguments import add_helix_arguments, exit_on_error
from helix_megatron.errors import HelixError
from helix_megatron.megatron_lm import settings
from helix_megatron.megatron_lm.table import HookTable

TABLE = HookTable("Helix's hooks")
ARGUMENTS = "megatron.training.arguments"


@TABLE.hook("flags", f"{ARGUMENTS}:add_megatron_arguments")
def _flags(upstream: Any) -> Callable[..., Any]:
    """The script's parser, and its --help, know Helix's flags.

    training/arguments.py: `parse_args` calls this function by its global name. The script's own
    `extra_args_provider` is fixed in its source.
    """

    @functools.wraps(upstream)
    def add_megatron_arguments(parser: Any) -> Any:
        parser = add_helix_arguments(upstream(parser))
        group = parser.add_argument_group("helix, in Megatron-LM")
        group.add_argument(
            settings.DRY_RUN,
            action="store_true",
            help="Print the configuration, the process groups and every hook, and stop before the model "
            "is built.",
        )
        group.add_argument(
            settings.LAYOUT_FREE_INIT,
            action="store_true",
            help="Draw initial weights in an order that depends on no parallel size, so that the same "
            "--seed is the same model at every layout. Every rank draws whole weights on the CPU.",
        )
        return parser

    return add_megatron_arguments


@TABLE.hook("validation", f"{ARGUMENTS}:validate_args")
@TABLE.hook("validation", "megatron.training.initialize:validate_args", before=(0, 18))
def _validation(upstream: Any) -> Callable[..., Any]:
    """Heads, ranks and flags are checked against each other before anything starts; exit code 2.

    Upstream checks heads against ranks when it builds the configuration; here that is built once before, so
    that a mistake costs no process groups. Up to 0.17 training/initialize.py has imported the function by name,
    so it is replaced there, too.
    """

    @functools.wraps(upstream)
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        with exit_on_error(os.path.basename(sys.argv[0])):
            result = upstream(args, *rest, **kwargs)
            settings.record(settings.settings_of(args))
            if settings.current().helix.active:
                importlib.import_module(ARGUMENTS).core_transformer_config_from_args(args)
        return result

    return validate_args


@TABLE.hook(
    "configuration", "megatron.core.transformer.transformer_config:TransformerConfig.__post_init__"
)
def _configuration(upstream: Any) -> Callable[[Any], None]:
    """More tensor parallel ranks than heads are accepted; what cannot work with cut heads is refused.

    core/transformer/transformer_config.py:924 wants the heads to be a multiple of the tensor parallel
    size. It sees the segments as heads meanwhile; the fields are as before afterwards.
    """

    @functools.wraps(upstream)
    def __post_init__(self: Any) -> None:
        given = settings.current()
        if not given.helix.active:
            upstream(self)
            return
        from helix_megatron.megatron.transformer_config import relaxed_head_checks

        self.helix, self.rotary_percent = given.helix, given.rotary_percent
        self.causal_masks_only = given.causal_masks_only
        with relaxed_head_checks(self, given.helix):
            upstream(self)

    return __post_init__


@TABLE.hook("groups", "megatron.core.parallel_state:initialize_model_parallel")
def _groups(upstream: Any) -> Callable[..., None]:
    """The groups of intra-head parallelism are made when Megatron has made its own.

    training/initialize.py:364 calls it as an attribute of the module. A dry run reports and ends here.
    """

    @functools.wraps(upstream)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        from helix_megatron import parallel_state
        from helix_megatron.megatron_lm import cpu, report

        given = settings.current()
        upstream(*args, **kwargs)
        if given.helix.active:
            parallel_state.register_intra_head_parallel(
                given.helix.intra_head_parallel_size,
                distributed_timeout_minutes=given.timeout_minutes,
                **parallel_state.nccl_arguments(kwargs),
            )
        if given.dry_run:
            report.report_and_exit(given, (TABLE, cpu.TABLE))

    return initialize_model_parallel


@TABLE.hook(
    "groups, forgotten",
    "megatron.core.parallel_state:destroy_model_parallel",
    "megatron.training.training:destroy_model_parallel",
)
def _forget_groups(upstream: Any) -> Callable[[], None]:
    """The groups of intra-head parallelism go when Megatron's go.

    training/training.py, which has imported it by name, makes all groups anew after a fault.
    """

    @functools.wraps(upstream)
    def destroy_model_parallel() -> None:
        from helix_megatron import parallel_state

        parallel_state.destroy_intra_head_parallel()
        upstream()

    return destroy_model_parallel


@TABLE.hook("random state", "megatron.core.tensor_parallel:model_parallel_cuda_manual_seed")
def _random_state(upstream: Any) -> Callable[..., None]:
    """A random state that the ranks of a head group share, for dropout of attention probabilities.

    Where ranks hold the same probabilities they must drop the same ones; Megatron's states differ between
    tensor parallel ranks. training/initialize.py:423 calls it as an attribute of the package.
    """

    @functools.wraps(upstream)
    def model_parallel_cuda_manual_seed(seed: int, *args: Any, **kwargs: Any) -> None:
        upstream(seed, *args, **kwargs)
        if settings.current().helix.active:
            _add_head_group_state(seed)

    return model_parallel_cuda_manual_seed


def _add_head_group_state(seed: int) -> None:
    # Megatron-LM's seed differs per pipeline stage already.
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from helix_megatron import parallel_state
    from helix_megatron.megatron.random import HEAD_GROUP_STATE, derive_seed

    head_group = parallel_state.get_head_group_parallel_rank()
    get_cuda_rng_tracker().add(HEAD_GROUP_STATE, derive_seed(seed, HEAD_GROUP_STATE, head_group))


@TABLE.hook(
    "random state, kept", "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.set_states"
)
def _keep_random_state(upstream: Any) -> Callable[[Any, Any], None]:
    """Loading the checkpoint of a run without Helix leaves the head groups' random state in place.

    training/checkpointing.py sets all states to those of the checkpoint, which then lacks it.
    """

    @functools.wraps(upstream)
    def set_states(self: Any, states: Any) -> None:
        from helix_megatron.megatron.random import HEAD_GROUP_STATE

        own = self.get_states().get(HEAD_GROUP_STATE)
        if own is not None and HEAD_GROUP_STATE not in states:
            states = {**states, HEAD_GROUP_STATE: own}
        upstream(self, states)

    return set_states


@TABLE.hook("model", "megatron.core.models.gpt.gpt_model:GPTModel.__init__")
@TABLE.hook(
    "hybrid model", "megatron.core.models.hybrid.hybrid_model:HybridModel.__init__", since=(0, 18)
)
@TABLE.hook(
    "hybrid model", "megatron.core.models.mamba.mamba_model:MambaModel.__init__", before=(0, 18)
)
def _model(upstream: Any) -> Callable[..., None]:
    """Self-attention is replaced in whatever layer, block or stack spec arrives: local or Transformer Engine.

    gpt_builders.py or hybrid_builders.py chooses the spec; --spec can name another, but not relax the
    configuration. With --helix-layout-free-init the weights are drawn here.
    """
    signature = inspect.signature(upstream)
    _, _, spec, *_ = signature.parameters

    @functools.wraps(upstream)
    def __init__(*args: Any, **kwargs: Any) -> None:
        given = settings.current()
        call = signature.bind(*args, **kwargs)
        if given.helix.active:
            from helix_megatron.megatron.specs import helix_spec

            for name in (spec, "mtp_block_spec"):
                if call.arguments.get(name) is not None:
                    call.arguments[name] = helix_spec(call.arguments[name], given.helix)
        if not given.layout_free_init:
            upstream(*call.args, **call.kwargs)
            return
        from helix_megatron.megatron.initialize import initialize_weights, weights_not_drawn

        model, config = call.arguments["self"], call.arguments["config"]
        with weights_not_drawn(config):
            upstream(*call.args, **call.kwargs)
        initialize_weights(model, config, given.seed)

    return __init__


@TABLE.hook("guard", "megatron.core.transformer.attention:Attention.__init__")
def _guard(upstream: Any) -> Callable[..., None]:
    """A model whose attention was not replaced is an error, and not stock attention in silence.

    Scripts for other models than GPT and hybrid ones build their layers past `GPTModel` and `HybridModel`.
    """

    @functools.wraps(upstream)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = settings.current()
        if given.helix.active:
            from helix_megatron.megatron.self_attention import VirtualSelfAttention

            if not isinstance(self, VirtualSelfAttention):
                raise HelixError(
                    f"{settings.SIZE} {given.helix.intra_head_parallel_size} was given, and this model "
                    f"builds {type(self).__name__} outside of GPTModel and HybridModel, where heads are not "
                    f"cut. Use it with pretrain_gpt.py or pretrain_hybrid.py, or leave {settings.SIZE} at 1."
                )
        upstream(self, *args, **kwargs)

    return __init__
