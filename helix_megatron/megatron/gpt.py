"""From a run to Megatron's configuration and model chunks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from helix_megatron.megatron.core_attention import context_spec
from helix_megatron.megatron.delta_net import with_delta_nets
from helix_megatron.megatron.dropout import use_layout_free_dropout
from helix_megatron.megatron.flat_norm import with_flat_norms
from helix_megatron.megatron.initialize import initialize_weights, weights_not_drawn
from helix_megatron.megatron.latent import with_whole_latents
from helix_megatron.megatron.local_rotary import turn_windowed_layers
from helix_megatron.megatron.model_options import (
    activation,
    apply_multipliers,
    can_fuse_activation,
    cap_logits,
    count_groups_by_best,
    leave_heads_without_rope_unnormalised,
)
from helix_megatron.megatron.norms import use_available_norms
from helix_megatron.megatron.notices import hide_notices
from helix_megatron.megatron.optional import available_backends
from helix_megatron.megatron.post_norms import with_post_norms
from helix_megatron.megatron.qk_norm import normalise_behind_rotary
from helix_megatron.megatron.specs import helix_spec
from helix_megatron.megatron.transformer_config import HelixLatentConfig, HelixTransformerConfig
from helix_megatron.model.description import ModelConfig
from helix_megatron.run.config import RunConfig
from helix_megatron.run.settings import Training, same_named


def transformer_config(run: RunConfig) -> HelixTransformerConfig:
    """Megatron's configuration of a run, with how attention is partitioned."""
    model, training = run.model, run.training
    settings = same_named(run.parallel, "megatron") | same_named(training, "megatron")
    if training.recompute_granularity == "full":
        settings["recompute_method"] = training.recompute_method
        settings["recompute_num_layers"] = training.recompute_num_layers
    if run.virtual_stages:
        # The batched form pairs messages wrongly with two stages and changes the loss silently.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    on_gpu = torch.cuda.is_available()
    kind = HelixLatentConfig if model.multi_latent_attention else HelixTransformerConfig
    config = kind(
        **model.transformer_settings | model.latent_settings,
        **settings,
        helix=run.helix,
        virtual_pipeline_model_parallel_size=run.virtual_stages,
        activation_func=activation(model),
        params_dtype=parameter_dtype(training),
        pipeline_dtype=parameter_dtype(training),
        use_cpu_initialization=not on_gpu,
        batch_p2p_sync=on_gpu,
        bias_dropout_fusion=on_gpu,
        bias_activation_fusion=on_gpu and can_fuse_activation(model),
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    others = model.own_settings | model.yarn_settings  # no fields of Megatron's
    for name, value in others.items():
        setattr(config, name, value)
    return config


def parameter_dtype(training: Training) -> torch.dtype:
    """The dtype of parameters and activations."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return dtypes[training.precision]


def build_model(run: RunConfig, config: HelixTransformerConfig) -> list[Any]:
    """This rank's model chunks (one per virtual pipeline stage), in DDP, on the training device."""
    chunks = []
    for stage in range(run.virtual_stages or 1):
        virtual = stage if run.virtual_stages else None
        with weights_not_drawn(config):
            model: Any = build_chunk(run, config, virtual)
        initialize_weights(model, config, run.training.seed)
        use_layout_free_dropout(model, config)
        if torch.cuda.is_available():
            model.cuda(torch.cuda.current_device())
        if run.training.precision != "fp32":
            model = Float16Module(config, model)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=run.parallel.overlap_grad_reduce,
            overlap_param_gather=run.parallel.overlap_param_gather,
            use_distributed_optimizer=run.parallel.use_distributed_optimizer,
        )
        disable_bucketing = stage > 0 or run.parallel.overlap_param_gather
        chunks.append(
            DistributedDataParallel(config, ddp_config, model, disable_bucketing=disable_bucketing)
        )
    return chunks


def build_chunk(
    run: RunConfig, config: HelixTransformerConfig, virtual_stage: int | None = None
) -> Any:
    """A `GPTModel`, or `HybridModel`, of one pipeline stage, weights not drawn."""
    use_engine = uses_transformer_engine(run.model)
    place = {
        "pre_process": parallel_state.is_pipeline_first_stage(False, virtual_stage),
        "post_process": parallel_state.is_pipeline_last_stage(False, virtual_stage),
    }
    hide_notices()
    if run.model.hybrid_layer_pattern is not None:
        from helix_megatron.megatron.hybrid import build_hybrid

        hybrid = build_hybrid(run, config, use_engine=use_engine, **place)
        apply_multipliers(hybrid, run.model)
        leave_communication_to_the_dispatcher(hybrid)
        return hybrid
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_engine,
        normalization=config.normalization,
        qk_l2_norm=run.model.qk_l2_norm,
        vp_stage=virtual_stage,
    )
    if not use_engine:
        spec = use_available_norms(spec)
        capped = run.model.attn_logit_softcapping is not None
        if capped or config.context_parallel_size > 1 or run.data.packed_documents:
            spec = context_spec(spec)
    if run.model.qk_norm_all_heads:
        spec = with_flat_norms(
            spec,
            heads=run.model.num_attention_heads,
            kv_heads=run.model.num_query_groups,
            head_dim=run.model.head_dim,
        )
    if run.model.post_norms:
        spec = with_post_norms(spec, before=not run.model.no_pre_norms)
    spec = helix_spec(spec, config.helix)
    if run.model.multi_latent_attention:
        spec = with_whole_latents(spec)
    if "linear attention" in run.model.traits:
        first = get_transformer_layer_offset(config, vp_stage=virtual_stage)
        here = run.model.linear_layers[first : first + len(spec.layer_specs)]
        spec = with_delta_nets(spec, here, use_engine=use_engine)
    model = GPTModel(config, spec, vp_stage=virtual_stage, **place, **run.model.gpt_settings)
    apply_multipliers(model, run.model)
    cap_logits(model, run.model.final_logit_softcapping)
    if run.model.moe_router_groups_by_best:
        count_groups_by_best(model)
    if run.model.scales_rope_otherwise:
        rope, high = model.rotary_pos_emb, run.model.rope_high_freq_factor
        factor = run.model.rope_scaling_factor
        rope.inv_freq = rope._apply_scaling(rope.inv_freq, factor, high_freq_factor=high)
    if run.model.rotary_base_windowed:
        stretch = run.model.rotary_seq_len_interpolation_factor or 1.0
        windowed, base = run.model.windowed_layers, run.model.rotary_base_windowed
        turn_windowed_layers(model, windowed, base, stretch)
    if run.model.qk_norm_behind_rotary:
        normalise_behind_rotary(model)
    if run.model.qk_l2_norm:
        leave_heads_without_rope_unnormalised(model, run.model.layers_without_rope)
    leave_communication_to_the_dispatcher(model)
    return model


def leave_communication_to_the_dispatcher(model: Any) -> None:
    """Linear layers of whole experts neither reduce their outputs nor share biases with tensor parallel ranks.

    Megatron's reduction over one rank returns what it is given, and autograd lets nobody add a bias to that in
    place. And it takes biases of experts for copies: with sequence parallelism it sums gradients of those on
    other tensor parallel ranks, which are of other experts, and leaves them out of the norm.
    """
    for module in model.modules():
        if getattr(module, "is_expert", False) and hasattr(module, "explicit_expert_comm"):
            module.explicit_expert_comm = True
            if module.bias is not None:
                module.bias.sequence_parallel = False
                module.bias.tensor_model_parallel = True


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Whether layers are Transformer Engine's: as asked for, else where it is installed and knows the model."""
    if model.transformer_impl is not None:
        return model.transformer_impl == "transformer_engine"
    return model.attn_logit_softcapping is None and available_backends().transformer_engine
