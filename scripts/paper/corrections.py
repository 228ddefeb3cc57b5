"""Every number of the deployment plan with the arithmetic done again. Computed here, not copied."""

from __future__ import annotations

from dataclasses import dataclass

from helix_megatron.core.layout import HeadLayout
from helix_megatron.hardware import CHIPS
from helix_megatron.plan.models import model_of
from paper import claims as c
from paper.simulated import exposed_shares

GROUPS = c.GPUS // c.SEGMENTS  # n
HEADS_HERE = c.HEADS // GROUPS
DIMS_HERE = c.HEAD_DIM // c.SEGMENTS
TOKENS = c.BATCH * c.SEQUENCE
COLUMNS = HEADS_HERE * DIMS_HERE  # of one of Q, K, V in a partition
FFN_HERE = c.FFN // c.GPUS
PEAK = CHIPS["h100"].flops["bf16"]
OLD_PEAK = CHIPS["a100"].flops["bf16"]
MEMORY = CHIPS["h100"].memory


@dataclass(frozen=True)
class Correction:
    """what: the quantity; plan: as it stands in the deployment plan; right: what it is; why: the arithmetic."""

    what: str
    plan: str
    right: str
    why: str


def corrections() -> list[Correction]:
    """All of them, in the order of the deployment plan."""
    return [*_model(), *_attention(), *_mlp(), *_balance(), *_runtime()]


def _model() -> list[Correction]:
    layer = (
        model_of("paper-dense").attention_parameters() + model_of("paper-dense").mlp_parameters()
    )
    embeddings = model_of("paper-dense").parameters - c.LAYERS * layer
    moe = model_of("paper-moe").parameters - embeddings
    activation = TOKENS * c.HIDDEN * 2
    layout = HeadLayout(c.HEADS, c.HEADS, c.HEAD_DIM, GROUPS, c.SEGMENTS)
    groups = [
        f"ranks {group * c.SEGMENTS}–{group * c.SEGMENTS + c.SEGMENTS - 1} hold heads "
        f"{layout.kv_heads(group * c.SEGMENTS).start}–{layout.kv_heads(group * c.SEGMENTS).stop - 1}"
        for group in range(GROUPS)
    ]
    return [
        Correction(
            "parameters",
            "~70B",
            f"{_si(c.LAYERS * layer)} (mixture of {c.EXPERTS} experts: {_si(moe)})",
            f"{c.LAYERS} layers × (4·{c.HIDDEN}² + 2·{c.HIDDEN}·{c.FFN}); the embeddings come on top, "
            f"{_si(embeddings)} with a vocabulary of 51200",
        ),
        Correction(
            "activations of the batch",
            "[1024, 10000, 8192], whole",
            f"{_si(activation)}B per tensor in 16 bit: micro-batches are needed",
            f"{c.BATCH}·{c.SEQUENCE}·{c.HIDDEN}·2 bytes; a GPU has {_si(MEMORY)}B. A micro-batch of one "
            f"sequence is {_si(activation / c.BATCH)}B",
        ),
        Correction(
            "heads of each GPU",
            "GPUs 0–3 hold heads 0–3, and so on",
            "the same",
            "; ".join(groups),
        ),
        Correction(
            "dimensions of a head on a GPU",
            "128",
            str(DIMS_HERE),
            f"{c.HEAD_DIM} / {c.SEGMENTS}. With rotary embedding they are two half-ranges, so that pairs of "
            "dimensions stay together",
        ),
        Correction(
            "need for cutting heads",
            "16 heads, 16 GPUs: m = 4",
            "none: TP = 16 by whole heads is legal",
            f"{c.HEADS} heads / {c.GPUS} ranks = 1 head each, m = 1, no exchange. It must be in every "
            "comparison",
        ),
    ]


def _attention() -> list[Correction]:
    projection = TOKENS * c.HIDDEN * COLUMNS
    scores = TOKENS * HEADS_HERE * DIMS_HERE * c.SEQUENCE
    matrix = TOKENS * HEADS_HERE * c.SEQUENCE * 2
    return [
        Correction(
            "weights of QKV on a GPU",
            f"[{c.HIDDEN}, {COLUMNS}]",
            f"[{c.HIDDEN}, {3 * COLUMNS}]",
            f"{HEADS_HERE} heads × {DIMS_HERE} dimensions for each of Q, K and V. In the paper "
            "W⁽ⁱʲ⁾ ∈ ℝ^(d_s·h_g × d_s·h_g) should be ℝ^(D × d_s·h_g)",
        ),
        Correction(
            "FLOPs of QKV, one partition",
            "42.9 TFLOPs",
            f"{_si(2 * 3 * projection)}FLOP",
            f"{TOKENS}·{c.HIDDEN}·{COLUMNS} = {_si(projection)} multiply-adds of one projection; 2 FLOP each, "
            "3 projections",
        ),
        Correction(
            "FLOPs of QKV, all partitions",
            "686.4 TFLOPs",
            f"{_si(c.GPUS * 6 * projection)}FLOP",
            f"{c.GPUS} × {_si(6 * projection)}FLOP",
        ),
        Correction(
            "FLOPs of Q·Kᵀ, one partition",
            "52.4 PFLOPs",
            f"{_si(2 * scores)}FLOP ({_si(scores)}FLOP causal)",
            f"{TOKENS}·{HEADS_HERE}·{DIMS_HERE}·{c.SEQUENCE} = {_si(scores)} multiply-adds: T, not P",
        ),
        Correction(
            "FLOPs of attention × V, one partition",
            "52.4 PFLOPs",
            f"{_si(2 * scores)}FLOP ({_si(scores)}FLOP causal)",
            "the same product",
        ),
        Correction(
            "attention scores",
            "[1024, 10000, 4, 10000] on every GPU",
            "never stored",
            f"they would take {_si(matrix)}B in 16 bit; a fused kernel keeps tiles of them",
        ),
        Correction(
            "attention of a partition",
            "softmax(QᵢⱼKᵢⱼᵀ/√d_s)Vᵢⱼ over 128 dimensions",
            "not the model's attention unless m = 1",
            "scores are sums over all 512 dimensions. `exact` exchanges segments, so that they are; computed "
            "as the paper writes it, it is `segment-local`, another architecture (see the training curves)",
        ),
        Correction(
            "concatenation, two phases",
            "4 × [.., 4, 128] → [.., 4, 512] → [.., 8192]",
            "none",
            "the output projection is row-parallel: each rank multiplies its own columns, and one "
            "reduce-scatter adds the partial sums",
        ),
    ]


def _mlp() -> list[Correction]:
    product = TOKENS * c.HIDDEN * FFN_HERE
    return [
        Correction("weights of FC1 on a GPU", "[8192, 2048]", f"[{c.HIDDEN}, {FFN_HERE}]", "right"),
        *(
            Correction(
                f"FLOPs of {name}, one GPU (all)",
                "171.8 TFLOPs (2.75 PFLOPs)",
                f"{_si(2 * product)}FLOP ({_si(2 * c.GPUS * product)}FLOP)",
                f"{TOKENS}·{c.HIDDEN}·{FFN_HERE} = {_si(product)} multiply-adds, 2 FLOP each",
            )
            for name in ("FC1", "FC2")
        ),
        Correction(
            "output of FC2 on a GPU",
            "[1024, 10000, 2048]",
            "[1024, 10000, 8192], a partial sum",
            "row-parallel: every rank has all columns of a part of the sum; after the reduce-scatter of "
            f"sequence parallelism it holds {c.SEQUENCE // c.GPUS} tokens of each sequence",
        ),
        Correction(
            "communication of the MLP",
            "gather after FC1, all-reduce after FC2",
            "all-gather before FC1, reduce-scatter after FC2",
            "FC1's output is FC2's input on the same rank: nothing is gathered between them",
        ),
    ]


def forward_flops(causal: bool) -> float:
    """Of a token in the dense model's layers: 2 for each weight, and attention to all or to earlier tokens."""
    full = model_of("paper-dense")
    weights = full.attention_parameters() + full.mlp_parameters()
    seen = c.SEQUENCE / 2 if causal else c.SEQUENCE
    return full.num_layers * (2 * weights + 4 * seen * c.HIDDEN)


def share_of_peak(causal: bool) -> float:
    """Of all GPUs' bf16 peak, what a forward pass at the paper's tokens/s takes."""
    rate = c.claim("dense", c.PROPOSED).tokens_per_second
    return rate * forward_flops(causal) / (c.GPUS * PEAK)


def _balance() -> list[Correction]:
    full = model_of("paper-dense")
    return [
        Correction(
            "speed-up",
            "16×, perfect linear scaling",
            "below 16",
            "tensor parallelism communicates in every layer; see the simulated tables",
        ),
        Correction(
            "communication",
            "below 5 % of the time",
            " and ".join(f"{share:.0%} {name}" for name, share in exposed_shares().items()),
            "simulated, training, TP 16 = m 4 × n 4, one sequence a micro-batch: what no computation hides",
        ),
        Correction(
            "memory of a GPU",
            "1/16",
            "1/16 of weights; of activations only with sequence parallelism",
            "norms and biases of row-parallel linears are on every rank; without sequence parallelism so are "
            "the residual stream and the inputs of every layer",
        ),
        Correction(
            "FLOPs of a token, forward",
            "–",
            f"{_si(forward_flops(False))}FLOP ({_si(forward_flops(True))}FLOP causal)",
            f"2 × {_si(c.LAYERS * (full.attention_parameters() + full.mlp_parameters()))} weights + "
            f"{c.LAYERS} layers × 4·{c.SEQUENCE}·{c.HIDDEN} (half of it causal). 1.58M tokens/s on 16 H100 "
            f"are {share_of_peak(False):.0%} ({share_of_peak(True):.0%}) of "
            "their peak, "
            "forward only; training would need three times as much",
        ),
    ]


def _runtime() -> list[Correction]:
    old = c.GPUS * OLD_PEAK
    theirs = 2 * (TOKENS * c.HIDDEN * COLUMNS + TOKENS * HEADS_HERE * DIMS_HERE * c.SEQUENCE) / old
    theirs += 2 * 2 * TOKENS * c.HIDDEN * FFN_HERE / old
    rank = (
        2
        * TOKENS
        * (c.HIDDEN * 3 * COLUMNS + 2 * HEADS_HERE * DIMS_HERE * c.SEQUENCE + COLUMNS * c.HIDDEN)
    )
    rank += 2 * 2 * TOKENS * c.HIDDEN * FFN_HERE
    return [
        Correction(
            "peak of a GPU",
            "312 TFLOPS",
            f"{PEAK / 1e12:.0f} TFLOP/s",
            "312 is the A100's in bf16; the GPUs are H100 SXM",
        ),
        Correction(
            "runtime of a layer",
            f"{theirs:.2f} s (what the plan's script prints)",
            f"{rank / PEAK:.2f} s at peak",
            "the script counts multiply-adds, one projection of four, and divides the work of one partition "
            f"by all {c.GPUS} GPUs again. A partition has {_si(rank)}FLOP in a layer (QKV, scores, "
            "values, output, "
            f"FC1, FC2; attention not causal) over {TOKENS} tokens, at {PEAK / 1e12:.0f} TFLOP/s",
        ),
    ]


def _si(value: float) -> str:
    """`3.22 G`, `42.9 T`: three digits and a prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5:
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {prefix}"
        value /= 1000
    return f"{value:.2f} E"
