"""`helix serve` of a checkpoint of training whose layers megatron-core trains and the engine does not know."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
import torch
import transformers
from test_serve_command import served

from helix_megatron import cli

# A model of bytes, from no Hugging Face model.
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --kv-channels 16 --group-query-attention "
    "--num-query-groups 2 --normalization RMSNorm --disable-bias-linear --swiglu --qk-layernorm "
    "--attention-output-gate --apply-layernorm-1p --rotary-percent 0.5 --linear-attention-freq 2 "
    "--linear-num-key-heads 4 --linear-num-value-heads 8 --linear-key-head-dim 8 --linear-value-head-dim 8 "
    "--init-method-std 0.3 --seq-length 64 --train-iters 1 --tensor-model-parallel-size 2 "
    "--intra-head-parallel-size 2"
)


def train(flags: str) -> None:
    """On a rank."""
    import torch.distributed as dist

    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.training.arguments import parse_args
    from helix_megatron.training.pretrain import training
    from helix_megatron.training.validate import validate

    cpu_runtime.install()
    list(training(validate(parse_args(flags.split()), dist.get_world_size())))


@torch.inference_mode()
def greedy(path: Path, prompt: list[int], count: int) -> str:
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return bytes(ids[0, len(prompt) :].tolist()).decode(errors="replace")


@pytest.mark.full("serving")
def test_what_was_trained_here_is_served(pool, tmp_path):
    """One step of a model with gated delta nets; its tokens are those of the files that conversion makes."""
    run, back = tmp_path / "run", tmp_path / "back"
    pool.run(train, f"{FLAGS} --save {run}", world_size=2)
    assert cli.main(["convert", str(run), str(back), "--to", "huggingface"]) == 0
    with served(run, ranks=2) as server:
        client = openai.OpenAI(base_url=server.base, api_key="none", max_retries=0)
        answer = client.completions.create(
            model="run", prompt=[1, 2, 3], max_tokens=24, temperature=0
        )
    assert answer.choices[0].text == greedy(back, [1, 2, 3], 24)
