"""Tiny models trained by DeepSpeed engines on the CPU, with the same weights and batches in every layout."""

from __future__ import annotations

import json
import logging
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from helix_megatron.errors import HelixError

VOCABULARY, LENGTH, SAMPLES = 64, 12, 8
LEARNING_RATE = 3e-3
TIMEOUT = (
    150.0  # the first run of a rank imports DeepSpeed and transformers; the machine may be busy
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
FP16_SCALE_POWER = 10
ON_4 = {"intra_head_parallel_size": 2, "tensor_parallel_size": 4}
ON_2 = {"intra_head_parallel_size": 2, "tensor_parallel_size": 2}


@dataclass(frozen=True)
class Run:
    """How one engine trains; `helix` None is plain DeepSpeed."""

    helix: dict[str, Any] | None = None
    stage: int = 0
    precision: str = "fp32"
    model: str = "llama"
    steps: int = 6
    accumulate: int = 1
    clip: float = 0.25
    optimizer: str = "AdamW"
    settings: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> Run:
        return replace(self, **changes)


Log = list[tuple[float, float]]
"""(loss, gradient norm before clipping) of each step."""


def start() -> None:
    """DeepSpeed as new, on the CPU, compiling nothing."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import groups

    from helix_megatron.deepspeed import upstream

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # A CPU without half-precision kernels computes it all the same, slowly.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.comm.comm.cdb = None  # of a process group that is gone
    deepspeed.zero.Init.param_id = 0  # ranks must number their parameters alike
    for name, value in vars(groups).items():
        if name.isupper() and ("GROUP" in name or "MPU" in name):
            value.clear() if isinstance(value, dict) else setattr(groups, name, None)
    groups.mpu, groups.mesh_device, groups.expert_tensor_parallel_world_size = None, None, 1
    upstream.UNFUSED_NORM.uninstall()
    upstream.MOE_GATHER.uninstall()
    upstream.MOE_GATHER.install()


def deepspeed_moe(**settings: Any) -> str:
    """The name of a model with DeepSpeed's MoE layers."""
    return "deepspeed moe" + json.dumps({"enable_expert_tensor_parallelism": True} | settings)


def build(kind: str) -> torch.nn.Module:
    """The same random model on all ranks, norms and all."""
    import transformers

    torch.manual_seed(11)
    if kind == "mixtral":
        config: Any = transformers.MixtralConfig(**SIZES, **EXPERTS)
        model: Any = transformers.MixtralForCausalLM(config)
    else:
        tied = "tied" in kind
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if kind.startswith("deepspeed moe"):
        use_deepspeed_experts(model, **json.loads(kind.removeprefix("deepspeed moe")))
    if kind == "llama in parts":
        sum_in_parts(model)
    return (Wrapped(model) if kind.startswith("wrapped") else model).train()


class DeepSpeedExperts(torch.nn.Module):
    """DeepSpeed's own MoE layer in the place of an MLP."""

    def __init__(self, mlp: torch.nn.Module, plain: bool, **settings: Any) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        hidden = SIZES["hidden_size"]
        if plain:
            linear = torch.nn.Linear
            mlp = torch.nn.Sequential(linear(hidden, 40), torch.nn.GELU(), linear(40, hidden))
        # Room for all tokens: which are dropped would depend on how many ranks gather them.
        room = {"capacity_factor": 4.0, "eval_capacity_factor": 4.0, "min_capacity": 0}
        self.moe = MoE(hidden, mlp, num_experts=4, k=1, use_rts=False, **room, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x)[0]


def use_deepspeed_experts(model: Any, plain: bool = True, **settings: Any) -> None:
    for layer in model.model.layers:
        layer.mlp = DeepSpeedExperts(layer.mlp, plain, **settings)
        _make_experts_differ(layer.mlp.moe)


def _make_experts_differ(moe: Any) -> None:
    """DeepSpeed copies one expert. Number them globally: a replica's ranks hold the same, replicas others."""
    local = moe.deepspeed_moe.experts.deepspeed_experts
    replica = dist.get_rank() * moe.ep_size // dist.get_world_size()
    first = replica * len(local)
    with torch.no_grad():
        for number, expert in enumerate(local, first):
            generator = torch.Generator().manual_seed(number)
            for parameter in expert.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class MegatronLoss(torch.nn.Module):
    """A megatron-core model called like a Hugging Face one: predict each token from those before.

    auxiliary_scale: what a loop of one's own would set before each forward pass; None leaves it to Helix.
    """

    def __init__(self, model: torch.nn.Module, auxiliary_scale: float | None) -> None:
        super().__init__()
        self.model = model
        self.auxiliary_scale = auxiliary_scale

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        if self.auxiliary_scale is not None:
            from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

            MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(self.auxiliary_scale))
        positions = torch.arange(input_ids.size(1)).expand_as(input_ids)
        losses = self.model(input_ids, positions, None, labels=labels.roll(-1, dims=1))
        return types.SimpleNamespace(loss=losses.float().mean())


def build_megatron(run: Run) -> torch.nn.Module:
    """A megatron-core model of the training script's flags, which `run.model` has."""
    from helix_megatron import parallel_state
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.megatron.gpt import build_chunk, transformer_config
    from helix_megatron.megatron.initialize import initialize_weights, weights_not_drawn
    from helix_megatron.megatron.random import seed_model_parallel
    from helix_megatron.training.arguments import parse_args
    from helix_megatron.training.validate import validate

    cpu_runtime.install()
    flags = run.model.removeprefix("scaled ").split()
    scale = (2.0**FP16_SCALE_POWER if run.precision == "fp16" else 1.0) / run.accumulate
    if run.precision != "fp32":
        flags.append(f"--{run.precision}")
    settings = validate(parse_args(flags), dist.get_world_size())
    parallel_state.initialize_model_parallel(
        settings.parallel.tensor_model_parallel_size,
        intra_head_parallel_size=settings.helix.intra_head_parallel_size,
    )
    seed_model_parallel(settings.training.seed)
    config = transformer_config(settings)
    with weights_not_drawn(config):
        model = build_chunk(settings, config)
    initialize_weights(model, config, settings.training.seed)
    return MegatronLoss(model, scale if run.model.startswith("scaled ") else None)


class Wrapped(torch.nn.Module):
    """A model inside a module of the user's, with a parameter of its own."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        return types.SimpleNamespace(loss=output.loss * self.scale.sum())


def sum_in_parts(model: torch.nn.Module, parts: int = 4) -> None:
    """Have one process round and add in the order of tensor parallel ranks.

    Outputs of row-parallel layers are sums over parts of the columns, and gradients of column-parallel layers'
    inputs are sums over parts of the rows, each part rounded before it is added.
    """
    linear = torch.nn.functional.linear

    def by_columns(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        pairs = zip(x.chunk(parts, -1), self.weight.chunk(parts, -1), strict=True)
        return sum(linear(part, weight) for part, weight in pairs)

    def by_rows(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(x, weight) for weight in self.weight.chunk(parts, 0)], -1)

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            forward = by_columns if path.endswith(("o_proj", "down_proj")) else by_rows
            module.forward = types.MethodType(forward, module)


def configuration(run: Run) -> dict[str, Any]:
    """The DeepSpeed configuration of a run; the micro-batch follows from the ranks."""
    config: dict[str, Any] = {
        "train_batch_size": SAMPLES,
        "gradient_accumulation_steps": run.accumulate,
        "gradient_clipping": run.clip,
        "optimizer": {"type": run.optimizer, "params": {"lr": LEARNING_RATE}},
        "zero_optimization": {"stage": run.stage},
        "zero_allow_untested_optimizer": True,
        **run.settings,
    }
    if "Adam" in run.optimizer:
        config["optimizer"]["params"]["torch_adam"] = True  # not the one that compiles
    if run.precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif run.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": FP16_SCALE_POWER}
    if run.helix is not None:
        config["helix"] = run.helix
    return config


def build_engine(run: Run) -> Any:
    """An engine on this rank of a fresh process group."""
    start()
    from helix_megatron.deepspeed import initialize

    def parameters(model: torch.nn.Module) -> Any:
        if not run.model.startswith("deepspeed moe"):
            return model.parameters()
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        everything = {"params": list(model.parameters()), "name": "all"}
        return split_params_into_different_moe_groups_for_optimizer(everything)

    model = build_megatron(run) if "--num-layers" in run.model else build(run.model)
    return initialize(model=model, model_parameters=parameters(model), config=configuration(run))[0]


def train(run: Run) -> Log:
    """Train from the canonical weights."""
    engine = build_engine(run)
    return [step(engine, number) for number in range(run.steps)]


def train_with_torch(run: Run) -> Log:
    """The same in plain PyTorch, in one process."""
    start()
    model = build(run.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    log = []
    for number in range(run.steps):
        ids = samples(number)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        optimizer.zero_grad()
        log.append((float(loss.detach()), float(norm)))
    return log


def norms_with_and_without_mend(run: Run) -> tuple[tuple[float, float], tuple[float, float]]:
    """The first step's loss and norm, as Helix has it and as DeepSpeed has it."""
    from helix_megatron.deepspeed.upstream import UNFUSED_NORM

    mended = step(build_engine(run), 0)
    engine = build_engine(run)
    UNFUSED_NORM.uninstall()
    return mended, step(engine, 0)


def train_and_save(run: Run, directory: str, save_at: int) -> tuple[Log, dict[str, Any]]:
    """Train, save on the way; the log, and the whole weights at the end of a Hugging Face model."""
    from transformers import PreTrainedModel

    from helix_megatron.huggingface import gather_state_dict

    engine = build_engine(run)
    log, whole = [], {}
    for number in range(run.steps):
        log.append(step(engine, number))
        if number + 1 == save_at:
            engine.save_checkpoint(directory, client_state={"number": number + 1})
            plain = run.stage < 3 and isinstance(engine.module, PreTrainedModel)
            gathered = gather_state_dict(engine.module) if plain else {}
            whole = {name: value.float().numpy().copy() for name, value in gathered.items()}
    return log, whole


def resume(run: Run, directory: str) -> Log:
    """Train on from a checkpoint to the same last step. The weights before loading are others."""
    engine = build_engine(run)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.add_(1.0)
    _, state = engine.load_checkpoint(directory)
    return [step(engine, number) for number in range(state["number"], run.steps)]


def error_of_loading(run: Run, directory: str) -> str:
    """What loading a checkpoint raises."""
    engine = build_engine(run)
    return error_of(engine.load_checkpoint, directory)


def error_of_16bit_model(run: Run) -> str:
    """What DeepSpeed's way to save the model alone raises."""
    return error_of(build_engine(run).save_16bit_model, "nowhere")


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    """The text of the `HelixError` that a call raises."""
    try:
        function(*args, **kwargs)
    except HelixError as error:
        return str(error)
    raise AssertionError("no error was raised")


def step(engine: Any, number: int) -> tuple[float, float]:
    """One optimizer step over the samples of that number: (loss over all replicas, norm of the gradient)."""
    losses = []
    for ids in micro_batches(engine, number):
        output = engine(input_ids=ids, labels=ids)
        engine.backward(output.loss)
        losses.append(output.loss.detach().float())
        norm = kept_norm(engine)
        engine.step()
    loss = torch.stack(losses).mean()
    group = engine.data_parallel_group
    dist.all_reduce(loss, group=group)
    return float(loss) / group.size(), norm if norm is not None else float(
        engine.get_global_grad_norm()
    )


def kept_norm(engine: Any) -> float | None:
    """ZeRO 0 in fp32 clips with the right norm and does not say which."""
    if engine.zero_optimization_stage() or engine.bfloat16_enabled() or engine.fp16_enabled():
        return None
    from deepspeed.runtime.utils import clip_grad_norm_

    if not engine.is_gradient_accumulation_boundary():
        return None
    # DeepSpeed's own, with a limit that it does not reach
    return float(clip_grad_norm_(engine.module.parameters(), 1e9, mpu=engine.mpu))


def micro_batches(engine: Any, number: int) -> Iterator[torch.Tensor]:
    """This replica's parts of the step's samples, int64 [micro-batch, LENGTH]."""
    ids = samples(number)
    size = engine.train_micro_batch_size_per_gpu()
    rank, replicas = engine.data_parallel_group.rank(), engine.data_parallel_group.size()
    for index in range(engine.gradient_accumulation_steps()):
        first = (index * replicas + rank) * size
        yield ids[first : first + size]


def samples(number: int) -> torch.Tensor:
    """All samples of a step, int64 [SAMPLES, LENGTH]."""
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
