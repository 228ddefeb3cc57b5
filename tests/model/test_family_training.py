"""What families ask beside megatron-core's own options trains the same on cut heads as in one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hf_models import MODELS as MODELS_TO_CONVERT
from hf_models import read_config, save
from safetensors.torch import load_file
from test_family_generation import generated

from helix_megatron import cli

STEPS = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-2 "
    "--lr-decay-style constant"
)
SIZE = (
    f"{STEPS} --num-layers 2 --hidden-size 32 --num-attention-heads 4 --normalization RMSNorm "
    "--disable-bias-linear"
)
GROUPED = "--kv-channels 16 --group-query-attention --num-query-groups 2"
OF_BYTES = {"vocab_size": 256, "tie_word_embeddings": False}  # tied, 4 steps may lower no loss
CUT = "--tensor-model-parallel-size 4 --intra-head-parallel-size 2 --sequence-parallel"
MODELS = {
    "norms behind, of all heads": "--swiglu --post-norms --no-pre-norms --qk-layernorm --qk-norm-all-heads "
    "--residual-multiplier 0.5 --logits-scaling 2 --softmax-scale 0.3",
    "two rotary bases": "--geglu --post-norms --qk-layernorm --window-size 8 --window-attn-skip-freq 2 "
    "--rotary-base-windowed 500 --apply-layernorm-1p --no-rope-freq [1,0]",
    "soft caps": "--geglu --post-norms --window-size 8 --window-attn-skip-freq [1,0] --softmax-scale 0.3 "
    "--attn-logit-softcapping 0.5 --final-logit-softcapping 4",
    "sinks, yarn, norms behind it": "--quick-geglu --activation-func-clamp-value 1.0 --glu-linear-offset 1 "
    "--softmax-type learnable --position-embedding-type yarn --yarn-rotary-scaling-factor 4 "
    "--yarn-original-max-position-embeddings 64 --qk-layernorm --qk-norm-behind-rotary",
    "gated delta nets": "--swiglu --qk-layernorm --attention-output-gate --apply-layernorm-1p "
    "--rotary-percent 0.5 --linear-attention-freq 2 --linear-num-key-heads 4 --linear-num-value-heads 8 "
    "--linear-key-head-dim 8 --linear-value-head-dim 8",
    "latent attention": "--swiglu --multi-latent-attention --qk-layernorm --q-lora-rank 24 --kv-lora-rank 16 "
    "--qk-head-dim 6 --qk-pos-emb-head-dim 8 --v-head-dim 10 --position-embedding-type yarn "
    "--yarn-rotary-scaling-factor 4 --yarn-original-max-position-embeddings 8 --yarn-mscale-all-dim 0.7 "
    "--yarn-correction-range-round-to-int",
    "layers of a pattern": "--num-layers 5 --hybrid-layer-pattern=M*M-E --squared-relu --num-experts 4 "
    "--position-embedding-type none --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32 "
    "--moe-latent-size 16 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-dtype fp32 --moe-router-load-balancing-type none --mamba-num-heads 8 --mamba-head-dim 8 "
    "--mamba-state-dim 8 --mamba-num-groups 1 --mamba-time-step-min 0.02 --embedding-multiplier 2 "
    "--residual-multiplier 0.5 --logits-scaling 2 --softmax-scale 0.3",
    "experts on the last stage": "--swiglu --num-experts 4 --moe-layer-freq [0,1] --moe-ffn-hidden-size 32",
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
        ("sinks, yarn, norms behind it", CUT),
        ("soft caps", "--tensor-model-parallel-size 2 --context-parallel-size 2"),
        ("gated delta nets", CUT.removesuffix("--sequence-parallel")),
        ("latent attention", "--tensor-model-parallel-size 4"),
        (
            "experts on the last stage",
            "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
        ),
        ("layers of a pattern", CUT),
        *(
            pytest.param(name, CUT, marks=pytest.mark.full("training"))
            for name in ("two rotary bases", "soft caps", "balanced experts", "gated delta nets")
        ),
        pytest.param(
            "latent attention",
            "--tensor-model-parallel-size 4 --sequence-parallel",
            marks=pytest.mark.full("training"),
        ),
    ],
)
def test_losses_and_norms_are_those_of_one_process(pool, name, cut):
    """Gradients of what every rank holds whole, and uses a part of, must be summed over ranks, once."""
    heads = "" if name == "latent attention" else GROUPED
    flags = f"{SIZE} {heads} {MODELS[name]}"
    compare(pool, flags, f"{flags} {cut}", 4)


def compare(pool, alone: str, cut: str, ranks: int, after: int = 0) -> None:
    """The steps of a run `cut` are those of one process, after some of these."""
    one = pool.run(train, alone, 1, world_size=1)[0][after:]
    several = pool.run(train, cut, ranks, world_size=ranks)[0]
    assert after or one[0]["lm_loss"] - one[-1]["lm_loss"] > 0.05
    assert len(one) == len(several) > 0
    for key in {"lm_loss", "grad_norm", "load_balancing_loss"} & one[0].keys():
        found, wanted = ([record[key] for record in run] for run in (several, one))
        assert all(map(math.isfinite, found))
        assert found == pytest.approx(wanted, rel=1e-4), key


@pytest.mark.parametrize(
    ("name", "cut", "ranks"),
    [
        pytest.param(
            "deepseek v3",
            "--tensor-model-parallel-size 2 --sequence-parallel",
            2,
            marks=pytest.mark.full("training"),
        ),
        ("nemotron h", CUT, 4),
        pytest.param("granite 4", CUT, 4, marks=pytest.mark.full("training")),
        pytest.param("bamba", CUT, 4, marks=pytest.mark.full("training")),
        pytest.param(
            "granite 4 with MLPs and one group", CUT, 4, marks=pytest.mark.full("training")
        ),
    ],
)
def test_a_converted_model_trains(pool, tmp_path, monkeypatch, name, cut, ranks):
    """Models with experts, described by the checkpoint alone; the run goes on at another layout."""
    kind, settings = MODELS_TO_CONVERT[name]
    monkeypatch.setitem(MODELS_TO_CONVERT, "of bytes", (kind, settings | OF_BYTES))
    save("of bytes", tmp_path / "hf")
    paths = (str(tmp_path / "hf"), str(tmp_path / "store"))
    assert cli.main(["convert", *paths, "--to", "canonical"]) == 0
    flags = f"--load {paths[1]} --use-checkpoint-args --finetune {STEPS}"
    saved = f"--save {tmp_path / 'run'} --save-interval 4"
    compare(pool, flags, f"{flags} {cut} {saved}", ranks)
    (newest,) = (tmp_path / "run").glob("iter_*")
    assert read_config(newest / "huggingface") == read_config(tmp_path / "hf")
    back = tmp_path / "back"
    assert cli.main(["convert", str(tmp_path / "run"), str(back), "--to", "huggingface"]) == 0
    # Tokens that end texts and the longest sequence too, though samples had 32 tokens.
    assert read_config(back) == read_config(tmp_path / "hf")
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", back))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].shape == tensor.shape and after[key].isfinite().all()
        assert not torch.equal(after[key], tensor), f"{key} was not trained"
    wanted = pool.run(generated, str(back), world_size=2)[0]
    assert pool.run(generated, str(tmp_path / "run"), world_size=2)[0] == wanted
    resumed = f"--load {tmp_path / 'run'} --use-checkpoint-args {STEPS} --train-iters 5 "
    resumed += "--override-opt-param-scheduler"
    compare(pool, f"{flags} --train-iters 5", resumed, 1, after=4)
