"""From flags to Megatron's configuration, model chunks, optimizer and learning-rate schedule."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from helix_megatron.megatron.dropout import use_layout_free_dropout
from helix_megatron.megatron.initialize import initialize_weights, weights_not_drawn
from helix_megatron.megatron.norms import use_available_norms
from helix_megatron.megatron.notices import hide_notices
from helix_megatron.megatron.optional import available_backends
from helix_megatron.megatron.specs import helix_spec
from helix_megatron.megatron.transformer_config import HelixTransformerConfig
from helix_megatron.training.model_options import activation, can_fuse_activation, scale_embeddings
from helix_megatron.training.validate import rotary_percent

# Flags that are fields of TransformerConfig under the same name.
SAME_NAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "rotary_interleaved",
    "add_qkv_bias",
    "attention_output_gate",
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "fp16",
    "bf16",
    "recompute_granularity",
)
SAME_NAME_EXPERTS = (
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_token_dispatcher_type",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
)


def transformer_config(args: argparse.Namespace) -> HelixTransformerConfig:
    """Megatron's configuration of validated flags."""
    settings: dict[str, Any] = {name: getattr(args, name) for name in SAME_NAME}
    if args.num_experts is not None:
        settings |= {name: getattr(args, name) for name in SAME_NAME_EXPERTS}
        settings["num_moe_experts"] = args.num_experts
    if args.recompute_granularity == "full":
        settings["recompute_method"] = args.recompute_method
        settings["recompute_num_layers"] = args.recompute_num_layers
    if args.window_size is not None:
        settings["window_size"] = (args.window_size, 0)
        settings["window_attn_skip_freq"] = args.window_attn_skip_freq
    if args.virtual_pipeline_model_parallel_size:
        # The batched form pairs messages wrongly with two stages and changes the loss silently.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    on_gpu = torch.cuda.is_available()
    return HelixTransformerConfig(
        **settings,
        helix=args.helix,
        rotary_percent=rotary_percent(args),
        layernorm_epsilon=args.norm_epsilon,
        layernorm_zero_centered_gamma=args.apply_layernorm_1p,
        add_bias_linear=not args.disable_bias_linear,
        gated_linear_unit=args.swiglu or args.geglu,
        activation_func=activation(args),
        qk_layernorm=args.qk_layernorm or args.qk_l2_norm,
        params_dtype=parameter_dtype(args),
        pipeline_dtype=parameter_dtype(args),
        use_cpu_initialization=not on_gpu,
        batch_p2p_sync=on_gpu,
        bias_dropout_fusion=on_gpu,
        bias_activation_fusion=on_gpu and can_fuse_activation(args),
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )


def parameter_dtype(args: argparse.Namespace) -> torch.dtype:
    """dtype of the weights that forward and backward use."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32


def build_model(args: argparse.Namespace, config: HelixTransformerConfig) -> list[Any]:
    """This rank's model chunks (one per virtual pipeline stage), in DDP, on the training device."""
    chunks = []
    for stage in range(args.virtual_pipeline_model_parallel_size or 1):
        virtual = stage if args.virtual_pipeline_model_parallel_size else None
        with weights_not_drawn(config):
            model: Any = build_chunk(args, config, virtual)
        initialize_weights(model, config, args.seed)
        use_layout_free_dropout(model, config)
        if torch.cuda.is_available():
            model.cuda(torch.cuda.current_device())
        if args.fp16 or args.bf16:
            model = Float16Module(config, model)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=args.overlap_grad_reduce,
            overlap_param_gather=args.overlap_param_gather,
            use_distributed_optimizer=args.use_distributed_optimizer,
        )
        disable_bucketing = stage > 0 or args.overlap_param_gather
        chunks.append(
            DistributedDataParallel(config, ddp_config, model, disable_bucketing=disable_bucketing)
        )
    return chunks


def build_chunk(
    args: argparse.Namespace, config: HelixTransformerConfig, virtual_stage: int | None = None
) -> GPTModel:
    """A `GPTModel` of one pipeline stage, weights not drawn."""
    use_engine = uses_transformer_engine(args)
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_engine,
        normalization=config.normalization,
        qk_l2_norm=args.qk_l2_norm,
        vp_stage=virtual_stage,
    )
    spec = helix_spec(spec if use_engine else use_available_norms(spec), config.helix)
    place = {"ignore_virtual": False, "vp_stage": virtual_stage}
    hide_notices()
    model = GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=virtual_stage,
    )
    scale_embeddings(model, args.embedding_multiplier)
    return model


def uses_transformer_engine(args: argparse.Namespace) -> bool:
    """Whether layers are Transformer Engine's: as asked for, else where it is installed."""
    if args.transformer_impl is not None:
        return args.transformer_impl == "transformer_engine"
    return available_backends().transformer_engine


def build_optimizer(
    args: argparse.Namespace, chunks: list[Any]
) -> tuple[Any, OptimizerParamScheduler]:
    """Megatron's optimizer (apex's or Transformer Engine's Adam if there, else torch's) and schedule."""
    config = OptimizerConfig(
        optimizer=args.optimizer,
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        clip_grad=args.clip_grad,
        fp16=args.fp16,
        bf16=args.bf16,
        params_dtype=parameter_dtype(args),
        loss_scale=args.loss_scale,
        initial_loss_scale=args.initial_loss_scale,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_param_gather=args.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, chunks)
    batch = args.global_batch_size
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters * batch,
        lr_decay_steps=args.lr_decay_iters * batch,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.train_iters * batch,
        wd_incr_style="constant",
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
    )
    return optimizer, scheduler
