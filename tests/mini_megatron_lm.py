"""A stand-in for a Megatron-LM checkout: the few names of megatron.training that Helix's hooks know.

`write(folder)` makes one. Its megatron.core is the installed package, so models and groups are real. It has
what matters about the real one: which module calls which function by which name.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.package_info import MINOR

ARGUMENTS = '''
"""Flags, their validation, and the transformer configuration."""
import argparse
from dataclasses import fields

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def add_megatron_arguments(parser):
    parser.add_argument("--num-attention-heads", type=int, default=2)
    parser.add_argument("--num-query-groups", type=int, default=1)
    parser.add_argument("--group-query-attention", action="store_true")
    parser.add_argument("--kv-channels", type=int, default=8)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--position-embedding-type", default="rope")
    parser.add_argument("--rotary-percent", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--distributed-backend", default="nccl")
    parser.add_argument("--transformer-impl", default="transformer_engine")
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--multi-latent-attention", action="store_true")
    parser.add_argument("--ckpt-format", default="torch_dist")
    parser.add_argument("--save")
    parser.add_argument("--load")
    parser.add_argument("--yaml-cfg", action="store_true")
    return parser


def parse_args():
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args()
    if args.yaml_cfg:  # the command line is ignored, as upstream does
        args = argparse.Namespace(**{k: v for k, v in vars(args).items() if "helix" not in k})
    args.num_layers, args.hidden_size = 2, 16
    args.rotary_interleaved, args.distributed_timeout_minutes = False, 10
    args.hidden_dropout, args.params_dtype = 0.0, torch.float32
    args.use_cpu_initialization, args.bias_dropout_fusion = True, False
    args.bias_activation_fusion = args.masked_softmax_fusion = False
    return args


def validate_args(args):
    args.validated = True
    return args


def core_transformer_config_from_args(args):
    known = {f.name for f in fields(TransformerConfig)}
    settings = {name: value for name, value in vars(args).items() if name in known}
    if not args.group_query_attention:
        settings["num_query_groups"] = None
    return TransformerConfig(**settings)
'''

INITIALIZE = '''
"""Starts torch.distributed and makes the groups."""
import os

import torch
from megatron.core import parallel_state as mpu, tensor_parallel
from megatron.training import global_vars
from megatron.training.arguments import parse_args, validate_args


def initialize_megatron(allow_no_cuda=False):
    assert allow_no_cuda or torch.cuda.is_available(), "Megatron requires CUDA."
    args = parse_args()
    if not args.yaml_cfg:
        validate_args(args)
    global_vars.args = args
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            args.distributed_backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    if torch.cuda.device_count() > 0:
        torch.cuda.set_device(0)
        mpu.initialize_model_parallel(args.tensor_model_parallel_size)
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
'''

TRAINING = '''
"""`pretrain`, and what a restart after a fault forgets."""
import torch
from megatron.core.parallel_state import destroy_model_parallel
from megatron.legacy import fused_kernels
from megatron.training.global_vars import get_args
from megatron.training.initialize import initialize_megatron


def destroy_global_state():
    destroy_model_parallel()


def pretrain(model_provider):
    initialize_megatron()
    from megatron.core.datasets.utils import compile_helpers

    compile_helpers()
    fused_kernels.load(get_args())
    model = model_provider(get_args())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(24).reshape(2, 12) % 31
    positions = torch.arange(12).expand(2, 12)
    hidden = torch.ones(1, 1, 12, 12).triu(1).bool()
    for _ in range(3):
        loss = model(tokens, positions, hidden, labels=(tokens + 1) % 31).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        global_losses.append(loss.item())
    return global_losses


global_losses = []
'''

SCRIPT = '''
"""Builds a GPT with Megatron's local layers and trains three steps."""
import multiprocessing
import os
import sys

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.training import pretrain


def model_provider(args):
    return GPTModel(
        core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(),
        vocab_size=32,
        max_sequence_length=12,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
    )


def of_a_child(number: int):
    """What a script knows of itself: its name, its file, its annotations as objects."""
    return number + 1, __name__, os.path.basename(__file__), of_a_child.__annotations__


if __name__ == "__main__":
    if "--spawn" in sys.argv:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print("parent:", of_a_child(1))
            print("child:", pool.map(of_a_child, [1])[0])
    else:
        losses = pretrain(model_provider)
        print("losses:", losses, flush=True)
'''

FILES = {
    "megatron/training/__init__.py": "",
    "megatron/training/global_vars.py": "args = None\n\n\ndef get_args():\n    return args\n",
    "megatron/training/arguments.py": ARGUMENTS,
    "megatron/training/initialize.py": INITIALIZE,
    "megatron/training/training.py": TRAINING,
    "megatron/legacy/__init__.py": "",
    "megatron/legacy/fused_kernels/__init__.py": "def load(args):\n    raise OSError('no nvcc')\n",
    "pretrain_gpt.py": SCRIPT,
}
# What the checkout of the installed core's version no longer does.
if MINOR >= 18:  # initialize.py no longer imports `validate_args` by name
    by_name = "from megatron.training.arguments import parse_args, validate_args"
    calls = INITIALIZE.replace(by_name, "from megatron.training import arguments")
    for name in ("parse_args(", "validate_args("):
        calls = calls.replace(f" {name}", f" arguments.{name}")
    FILES["megatron/training/initialize.py"] = calls
if MINOR >= 17:  # nothing is compiled when training starts
    FILES["megatron/training/training.py"] = TRAINING.replace(
        "from megatron.legacy import fused_kernels\n", ""
    ).replace("    fused_kernels.load(get_args())\n", "")


def write(folder: Path) -> Path:
    """Write the stand-in; the path of its script."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip("\n"))
    (folder / "megatron/training/__init__.py").write_text(
        "from megatron.training.global_vars import get_args\n"
    )
    return folder / "pretrain_gpt.py"


@contextlib.contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """The stand-in's megatron.training can be imported inside the block, and is forgotten after it."""
    import megatron

    before = sys.argv, sys.modules["__main__"], list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.argv, sys.modules["__main__"], sys.path[:] = before
        for name in [
            n for n in sys.modules if n.startswith(("megatron.training", "megatron.legacy"))
        ]:
            del sys.modules[name]
        for name in ("training", "legacy"):
            if hasattr(megatron, name):
                delattr(megatron, name)


def train(folder: str, *flags: str) -> dict[str, Any]:
    """Launch the stand-in's script in this process, whose process group exists; its losses and attention."""
    from megatron.core.transformer.attention import SelfAttention

    from helix_megatron import launch, megatron_lm, parallel_state
    from helix_megatron.megatron_lm import settings

    with on_path(Path(folder)):
        try:
            launch.main([str(Path(folder, "pretrain_gpt.py")), *flags])
            script = sys.modules["__main__"]
            return {
                "losses": script.losses,
                "attention": SelfAttention.__init__.__qualname__,
                "intra_head": parallel_state.intra_head_parallel_is_initialized(),
            }
        finally:
            settings._recorded.clear()
            megatron_lm.uninstall()
            parallel_state.destroy_model_parallel()
