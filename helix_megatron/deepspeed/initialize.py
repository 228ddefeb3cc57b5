"""`deepspeed.initialize` with the block `"helix"`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from helix_megatron.deepspeed.config import KEY, HelixBlock, in_words_of_the_block, read_block
from helix_megatron.errors import HelixError

if TYPE_CHECKING:
    from torch import nn

    from helix_megatron.deepspeed.models import CutModel

DISTRIBUTED_PORT = 29500  # DeepSpeed's default


def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = DISTRIBUTED_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    **others: Any,
) -> tuple[Any, Any, Any, Any]:
    """Cut a model as the block `"helix"` of its DeepSpeed configuration says, and give it to DeepSpeed.

    The arguments and the result are those of `deepspeed.initialize`: `config` (or its older names) is a
    dictionary or the path of a JSON file. Without the block, or with one that cuts nothing, they are handed on
    as they are, and so is what newer releases take besides (`others`).

    The model is changed in place, and its parameters stay the same objects, so an optimizer may have been made
    of them before. It must be the same on all ranks: equal seeds or files. Each tensor parallel rank must be
    given the same batches; loaders made by DeepSpeed (`training_data`) see to that, a sampler of one's own
    asks `engine.mpu.get_data_parallel_rank()`.

    Args:
        model: of a Hugging Face family that `helix_megatron.huggingface` can cut, alone or inside a module; or
            a megatron-core model that was built with `HelixTransformerConfig`, which is cut already.
        mpu: None, or an object with `get_tensor_model_parallel_group` (or `get_model_parallel_group`) and
            `get_data_parallel_group`, whose groups are then used.

    Raises:
        HelixError: the block is wrong, does not fit the model or the world, or does not go together with
            another DeepSpeed setting.
    """
    given = dict(locals())
    import deepspeed

    if distributed_port == DISTRIBUTED_PORT:
        del given["distributed_port"]
    del given["others"]
    # Only what the caller gave: a release may have dropped an argument, and then nobody gives it.
    call = {name: value for name, value in given.items() if value is not None} | others
    settings = _settings(args, config, config_params)
    block = None if settings is None else read_block(settings)
    if block is None or not block.active:
        return deepspeed.initialize(**call)

    assert settings is not None
    from helix_megatron.deepspeed.support import check_call, check_settings
    from helix_megatron.deepspeed.upstream import require

    require()
    check_settings(settings)
    check_call(call)
    deepspeed.init_distributed(
        dist_backend=deepspeed.get_accelerator().communication_backend_name(),
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )
    with in_words_of_the_block():
        return _initialize(block, settings, call)


def _initialize(
    block: HelixBlock, settings: Mapping[str, Any], call: dict[str, Any]
) -> tuple[Any, Any, Any, Any]:
    import deepspeed
    import torch.distributed as dist

    from helix_megatron.deepspeed.checkpoints import guard_checkpoints
    from helix_megatron.deepspeed.support import check_zero_3, prepare_upstream

    model: nn.Module = call["model"]
    prepare_upstream(settings, model)
    block, mpu, cut = _cut_model(model, block, call.get("mpu"), dist.get_world_size())
    check_zero_3(settings, cut.host)
    # The block stays in the configuration, which DeepSpeed saves with every checkpoint.
    call.pop("config_params", None)
    call |= {"config": {**settings, KEY: block.to_dict()}, "mpu": mpu}
    with _without_config_file(call.get("args")):
        engine, *rest = deepspeed.initialize(**call)
    for finish in cut.attached:
        finish(engine)
    guard_checkpoints(engine, cut)
    deepspeed.utils.log_dist(f"Helix: {cut.summary}", ranks=[0])
    return (engine, *rest)


def _cut_model(
    model: nn.Module, block: HelixBlock, mpu: Any, ranks: int
) -> tuple[HelixBlock, Any, CutModel]:
    """Cut a model in place.

    Returns:
        The block with its sizes filled in, the `mpu` for DeepSpeed, and what was cut.
    """
    found = _transformers_models(model)
    if found:
        from helix_megatron.deepspeed.huggingface_models import cut_huggingface_models

        return cut_huggingface_models(model, found, block, mpu, ranks)
    from helix_megatron.deepspeed.models import megatron_config

    if megatron_config(model) is not None:
        from helix_megatron.deepspeed.megatron_models import cut_megatron_model

        return cut_megatron_model(model, block, mpu)
    raise HelixError(
        f'the block "{KEY}" cannot cut a {type(model).__name__}. Valid: a transformers model of a family that '
        "helix_megatron.huggingface knows, alone or inside a module, or a megatron-core model whose "
        "configuration is a HelixTransformerConfig. Leave the block out for DeepSpeed without Helix."
    )


def _transformers_models(model: nn.Module) -> dict[str, Any]:
    """The `transformers` models in a module that are in no other such model: by path, `""` for itself."""
    library = sys.modules.get("transformers")
    if library is None:  # then none of its models can be here
        return {}
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}." if outer else "") for outer in found)
        if isinstance(module, library.PreTrainedModel) and not inside:
            found[path] = module
    return found


def _settings(args: Any, config: Any, config_params: Any) -> dict[str, Any] | None:
    """The configuration as a dictionary of its own; None when there is none, which DeepSpeed will say."""
    given = config if config is not None else config_params
    for name in ("deepspeed_config", "deepscale_config"):
        if given is None:
            given = getattr(args, name, None)
    if given is None:
        return None
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, str):
        return None
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    try:
        return dict(load_ds_config(given))
    except (ValueError, OSError) as error:
        raise HelixError(
            f"the DeepSpeed configuration {given!r} cannot be read: {error} Give a dictionary or the path of "
            "a JSON file."
        ) from error


@contextlib.contextmanager
def _without_config_file(args: Any) -> Iterator[None]:
    """Inside, `args` names no configuration file: DeepSpeed refuses two configurations."""
    names = [n for n in ("deepspeed_config", "deepscale_config") if getattr(args, n, None)]
    kept = {name: getattr(args, name) for name in names}
    for name in names:
        setattr(args, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)
