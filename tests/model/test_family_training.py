"""What families ask beside megatron-core's own options trains the same on cut heads as in one process."""

from __future__ import annotations

import math
from typing import Any

import pytest

SIZE = (
    "--num-layers 2 --hidden-size 32 --kv-channels 16 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 "
    "--lr 1e-2 --lr-decay-style constant --normalization RMSNorm --disable-bias-linear"
)
CUT = "--tensor-model-parallel-size 4 --intra-head-parallel-size 2 --sequence-parallel"
MODELS = {
    "norms behind, of all heads": "--swiglu --post-norms --no-pre-norms --qk-layernorm --qk-norm-all-heads "
    "--residual-multiplier 0.5 --logits-scaling 2 --softmax-scale 0.3",
    "two rotary bases": "--geglu --post-norms --qk-layernorm --window-size 8 --window-attn-skip-freq 2 "
    "--rotary-base-windowed 500 --apply-layernorm-1p --no-rope-freq [1,0]",
    "sinks and yarn": "--quick-geglu --activation-func-clamp-value 1.0 --glu-linear-offset 1 "
    "--softmax-type learnable --position-embedding-type yarn --yarn-rotary-scaling-factor 4 "
    "--yarn-original-max-position-embeddings 64",
    "gated delta nets": "--swiglu --qk-layernorm --attention-output-gate --apply-layernorm-1p "
    "--rotary-percent 0.5 --linear-attention-freq 2 --linear-num-key-heads 4 --linear-num-value-heads 8 "
    "--linear-key-head-dim 8 --linear-value-head-dim 8",
    "balanced experts": "--swiglu --num-experts 4 --moe-ffn-hidden-size 32 --moe-router-topk 2 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-dtype fp32 "
    "--moe-router-topk-scaling-factor 1.5 --moe-router-load-balancing-type none",
}


def train(flags: str, world_size: int) -> list[dict[str, Any]]:
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.training.arguments import parse_args
    from helix_megatron.training.pretrain import training
    from helix_megatron.training.validate import validate

    cpu_runtime.install()
    run = validate(parse_args(flags.split()), world_size)
    return [metrics.record() for metrics in training(run)]


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("norms behind, of all heads", CUT),
        ("sinks and yarn", CUT),
        ("gated delta nets", CUT.removesuffix("--sequence-parallel")),
        *(
            pytest.param(name, CUT, marks=pytest.mark.full("training"))
            for name in ("two rotary bases", "balanced experts", "gated delta nets")
        ),
    ],
)
def test_losses_and_norms_are_those_of_one_process(pool, name, cut):
    """Gradients of what every rank holds whole, and uses a part of, must be summed over ranks, once."""
    flags = f"{SIZE} {MODELS[name]}"
    one = pool.run(train, flags, 1, world_size=1)[0]
    four = pool.run(train, f"{flags} {cut}", 4, world_size=4)[0]
    assert one[0]["lm_loss"] - one[-1]["lm_loss"] > 0.05
    for key in ("lm_loss", "grad_norm"):
        found, wanted = ([record[key] for record in run] for run in (four, one))
        assert all(map(math.isfinite, found))
        assert found == pytest.approx(wanted, rel=1e-4), key
