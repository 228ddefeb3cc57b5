"""What models ask of a run whose layers are not all attention over keys and values, and an MLP."""

from __future__ import annotations

from helix_megatron.errors import counted, divisors, listed, setting_error
from helix_megatron.model.checks import check_mamba_groups
from helix_megatron.model.description import ModelConfig
from helix_megatron.run.settings import Parallelism


def check_special_layers(
    model: ModelConfig, parallel: Parallelism, *, packed: bool, interleaved: bool
) -> None:
    """Refuse a layout that gated delta nets, Mamba layers or latent attention of the model do not have.

    Args:
        model, parallel: of the run.
        packed: whether its documents are packed.
        interleaved: whether pipeline stages are.

    Raises:
        HelixError: names the settings, why, and what to do.
    """
    ranks = parallel.tensor_model_parallel_size
    what = ""
    if "linear attention" in model.traits:
        _check_linear_attention(model, ranks)
        what = "<linear_attention_freq>: a gated delta net of Megatron"
    if model.hybrid_layer_pattern is not None:
        _check_hybrid(model, ranks, interleaved)
        what = "<hybrid_layer_pattern>: its stack of layers"
    if model.multi_latent_attention:
        _check_latent_attention(model, ranks)
        what = "<multi_latent_attention>: Megatron's attention in plain torch"
    if what and (parallel.context_parallel_size > 1 or packed):
        raise setting_error(
            f"<context_parallel_size> and <packed_documents> do not work with {what} needs the whole of "
            "one sequence. Leave them out."
        )


def _check_linear_attention(model: ModelConfig, ranks: int) -> None:
    heads = model.linear_num_key_heads
    if heads % ranks:
        raise setting_error(
            f"gated delta nets are cut by their own heads, and {counted(heads, 'key head')} cannot be "
            f"dealt to {ranks} tensor parallel ranks. Valid <tensor_model_parallel_size>: "
            f"{listed(divisors(heads))}."
        )


def _check_hybrid(model: ModelConfig, ranks: int, interleaved: bool) -> None:
    if "mamba" in model.traits:
        check_mamba_groups(model, ranks)
    if interleaved:
        raise setting_error(
            "<num_layers_per_virtual_pipeline_stage> does not work with <hybrid_layer_pattern>, whose "
            "layers megatron-core 0.16 does not interleave. Leave it out."
        )


def _check_latent_attention(model: ModelConfig, ranks: int) -> None:
    widths = {
        "<q_lora_rank>": model.q_lora_rank or 0,
        "<kv_lora_rank> and <qk_pos_emb_head_dim> together": model.kv_lora_rank
        + model.qk_pos_emb_head_dim,
    }
    for name, width in widths.items():
        if width % ranks:
            raise setting_error(
                f"{name} are {width} dimensions, whose projection cannot be dealt to {ranks} tensor "
                f"parallel ranks. Valid <tensor_model_parallel_size>: {listed(divisors(width))}."
            )
