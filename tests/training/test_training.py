"""Training gives the same losses and gradient norms at every layout, in fp32, as one process.

One layout is trained for 50 iterations, and all of them in the full tier; the others for 8.
"""

from __future__ import annotations

import functools
import math

import pytest
from tiers import is_full

from helix_megatron.training.arguments import parse_args
from helix_megatron.training.validate import validate

SIZE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --micro-batch-size 4 "
    "--global-batch-size 4 --lr 3e-3 --train-iters 50 --log-communication-time off"
)
GQA = "--num-attention-heads 4 --group-query-attention --num-query-groups 2"
DETAILS = (
    "--swiglu --normalization RMSNorm --qk-layernorm --disable-bias-linear --add-qkv-bias "
    "--rotary-percent 0.5 --untie-embeddings-and-output-weights --kv-channels 16"
)
# The load-balancing loss is one of a micro-batch, so all layouts of this model cut the batch alike.
EXPERTS = (
    "--num-experts 4 --moe-ffn-hidden-size 32 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--micro-batch-size 2"
)
BY_PARAGRAPH = ["--tokenizer-type", "byte", "--split-documents", "blank-line"]
HELIX = "--intra-head-parallel-size"
HALVED, QUARTERED = "--micro-batch-size 2", "--micro-batch-size 1"
TP, PP, EP = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--expert-model-parallel-size",
)

# name: (model, number of ranks, layout). Each model's reference is one process with stock attention.
LAYOUTS = {
    "2 ranks, m 2": ("", 2, f"{TP} 2 {HELIX} 2"),
    "2 ranks, m 2, PP 1, distributed optimizer": (
        "",
        2,
        f"{TP} 2 {HELIX} 2 --use-distributed-optimizer",
    ),
    "4 ranks, m 2": ("", 4, f"{TP} 4 {HELIX} 2"),
    "4 ranks, m 4, sequence parallel": ("", 4, f"{TP} 4 {HELIX} 4 --sequence-parallel"),
    "4 ranks, m 2, DP 2, distributed optimizer": (
        "",
        4,
        f"{TP} 2 {HELIX} 2 {HALVED} --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather",
    ),
    "4 ranks, m 2, PP 2": ("", 4, f"{TP} 2 {HELIX} 2 {PP} 2 {HALVED}"),
    "8 ranks, m 4, sequence parallel": ("", 8, f"{TP} 8 {HELIX} 4 --sequence-parallel"),
    "8 ranks, m 2, PP 2, DP 2": (
        "",
        8,
        f"{TP} 2 {HELIX} 2 {PP} 2 {QUARTERED} --use-distributed-optimizer --sequence-parallel",
    ),
    "GQA, 4 ranks, m 2": (GQA, 4, f"{TP} 4 {HELIX} 2"),
    "GQA, 4 ranks, m 2, score-reduce": (
        GQA,
        4,
        f"{TP} 4 {HELIX} 2 --helix-exchange score-reduce",
    ),
    "GQA, 8 ranks, m 4, all-to-all": (
        GQA,
        8,
        f"{TP} 8 {HELIX} 4 --helix-exchange all-to-all --sequence-parallel",
    ),
    "details, 4 ranks, m 2": (DETAILS, 4, f"{TP} 4 {HELIX} 2 --sequence-parallel"),
    "details, 4 ranks, m 2, recompute full": (
        DETAILS,
        4,
        f"{TP} 4 {HELIX} 2 {HALVED} --recompute-granularity full",
    ),
    "MoE, 2 ranks, m 2": (EXPERTS, 2, f"{TP} 2 {HELIX} 2 --sequence-parallel"),
    "MoE, 4 ranks, m 2": (EXPERTS, 4, f"{TP} 4 {HELIX} 2 --sequence-parallel"),
    "MoE, 4 ranks, m 2, EP 2": (EXPERTS, 4, f"{TP} 4 {HELIX} 2 --sequence-parallel {EP} 2"),
    "MoE, 4 ranks, m 2, EP 2, DP 2": (
        EXPERTS,
        4,
        f"{TP} 2 {HELIX} 2 --sequence-parallel {EP} 2 --use-distributed-optimizer",
    ),
    "MoE with biases, 4 ranks, m 2, EP 4": (
        "--num-experts 4 --moe-ffn-hidden-size 32 --micro-batch-size 2",
        4,
        f"{TP} 4 {HELIX} 2 --sequence-parallel {EP} 4",
    ),
    "MoE, 8 ranks, m 2, EP 2, PP 2": (
        EXPERTS,
        8,
        f"{TP} 4 {HELIX} 2 --sequence-parallel {EP} 2 {PP} 2",
    ),
}


def train(flags: str, world_size: int) -> list[dict[str, float]]:
    """Train on this rank; what each iteration measured."""
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.training.pretrain import training

    cpu_runtime.install()
    settings = validate(parse_args(flags.split()), world_size)
    return [metrics.record() for metrics in training(settings)]


def run(pool, flags: str, world_size: int = 1) -> list[dict[str, float]]:
    """What the first rank measured; all ranks must report the same losses."""
    by_rank = pool.run(train, flags, world_size, world_size=world_size)
    losses = [[record["lm_loss"] for record in records] for records in by_rank]
    assert all(other == losses[0] for other in losses), "ranks disagree about the loss"
    return by_rank[0]


@pytest.fixture(scope="module")
def reference(pool):
    """A model's run in one process with stock attention, once per model."""
    return functools.cache(lambda model: run(pool, f"{SIZE} {model}"))


def largest_difference(records: list[dict], others: list[dict], key: str = "lm_loss") -> float:
    return max(abs(a[key] - b[key]) for a, b in zip(records, others, strict=True))


# Trained for 50 iterations whatever the tier.
LONG = "GQA, 4 ranks, m 2"
IN_FULL_TIER = {
    "2 ranks, m 2",
    "8 ranks, m 4, sequence parallel",
    "GQA, 8 ranks, m 4, all-to-all",
    "MoE, 2 ranks, m 2",
    "MoE, 4 ranks, m 2, EP 2",
    "MoE, 8 ranks, m 2, EP 2, PP 2",
}
assert set(LAYOUTS) >= IN_FULL_TIER, "a layout was renamed"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.full("training")] * (name in IN_FULL_TIER))
        for name in LAYOUTS
    ],
)
def test_losses_are_those_of_one_process(pool, reference, name):
    """Whoever turns Helix on trains the same model; learning must be real for this to mean something."""
    model, ranks, layout = LAYOUTS[name]
    iterations = 50 if name == LONG or is_full("training") else 8
    expected = reference(f"{model} --train-iters {iterations}")
    records = run(pool, f"{SIZE} {model} {layout} --train-iters {iterations}", ranks)
    assert len(records) == iterations
    assert all(math.isfinite(record["lm_loss"]) for record in records)
    learned = records[0]["lm_loss"] - records[-1]["lm_loss"]
    assert learned > (1 if iterations == 50 else 0.2)
    assert largest_difference(records, expected) <= 1e-4
    # Rounding grows with training, in a norm more than in a loss.
    first = slice(0, 8)
    norms = [[record["grad_norm"] for record in run[first]] for run in (records, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-4)


def test_the_learning_rate_is_that_of_the_step(pool):
    """Not the one that the schedule has set for the next."""
    records = run(
        pool, f"{SIZE} --train-iters 3 --lr 1e-3 --lr-warmup-iters 2 --lr-decay-style constant"
    )
    assert [record["learning_rate"] for record in records] == pytest.approx([0, 5e-4, 1e-3])


@pytest.mark.parametrize(
    "layout",
    [
        f"{TP} 4 {HELIX} 2 --sequence-parallel",
        f"{TP} 2 {HELIX} 2 {PP} 2 {HALVED} --recompute-granularity full",
        f"{TP} 2 {HELIX} 2 {HALVED} --recompute-granularity selective",
    ],
)
def test_hidden_dropout_does_not_depend_on_the_layout(pool, reference, layout):
    """The same seed drops the same hidden states, with sequence, pipeline, data parallelism, recompute."""
    flags = f"{HALVED} --train-iters 8"
    dropout = f"{flags} --hidden-dropout 0.2"
    expected = reference(dropout)
    assert largest_difference(expected, reference(flags)) > 1e-2, "dropout does something"
    assert largest_difference(run(pool, f"{SIZE} {dropout} {layout}", 4), expected) <= 1e-5


def test_virtual_pipeline_stages_change_nothing(pool):
    """Interleaved stages pair their messages rightly."""
    flags = f"{SIZE} --num-layers 4 --train-iters 8"
    layout = f"{TP} 2 {HELIX} 2 {PP} 2 {HALVED} --num-layers-per-virtual-pipeline-stage 1"
    assert largest_difference(run(pool, f"{flags} {layout}", 4), run(pool, flags)) <= 1e-5


@pytest.mark.parametrize("exchange", ["gather-qk", "score-reduce", "all-to-all-batch"])
def test_attention_dropout_trains_and_ranks_agree(pool, reference, exchange):
    """Ranks that hold the same probabilities drop the same ones: else the loss would differ among them."""
    flags = f"{SIZE} --train-iters 6 --attention-dropout 0.3 {TP} 4 {HELIX} 2 --helix-exchange {exchange}"
    dropped = run(pool, flags, 4)
    assert all(math.isfinite(record["lm_loss"]) for record in dropped)
    assert largest_difference(dropped, reference("--train-iters 6")) > 1e-4


@pytest.mark.parametrize("precision", ["--bf16", "--fp16 --initial-loss-scale 16384"])
def test_half_precision_stays_near_one_process(pool, reference, precision):
    """Half precision differs by rounding only: no further from one process in fp32 than twice its own error."""
    flags = f"--train-iters 20 {precision}"
    exact, own = reference("--train-iters 20"), reference(flags)
    cut = run(pool, f"{SIZE} {flags} {TP} 4 {HELIX} 2 --sequence-parallel", 4)
    assert not any(record["skipped"] for record in cut)
    assert largest_difference(cut, exact) <= 2 * largest_difference(own, exact) + 1e-3


def test_segment_local_is_a_model_with_more_heads(pool):
    """Segment-local attention is stock attention with m times the heads: a whole training run agrees."""
    flags = f"{SIZE} --train-iters 10 --kv-channels 16"
    more_heads = f"{SIZE} --train-iters 10 --num-attention-heads 4 --kv-channels 8"
    layout = f"{TP} 4 {HELIX} 2 --helix-attention segment-local"
    records = run(pool, f"{flags} {layout}", 4)
    assert largest_difference(records, run(pool, more_heads)) <= 1e-5
    assert largest_difference(records, run(pool, flags)) > 1e-4, "another architecture"
    assert records[0]["attention_bytes_per_token"] == 0


def test_one_segment_is_stock_attention_bit_for_bit(pool):
    """m = 1 must not even round differently."""
    flags = f"{SIZE} --train-iters 5 {TP} 2"
    with_flag = [record["lm_loss"] for record in run(pool, f"{flags} {HELIX} 1", 2)]
    assert with_flag == [record["lm_loss"] for record in run(pool, flags, 2)]


def test_validation_loss_is_the_same_at_every_layout(pool):
    """Validation runs on held-out text and disturbs neither training nor its dropout."""
    flags = f"{SIZE} --train-iters 6 --eval-interval 3 --eval-iters 2 --hidden-dropout 0.1"
    expected = run(pool, flags)
    records = run(pool, f"{flags} {TP} 4 {HELIX} 2 --sequence-parallel", 4)
    validated = [record["iteration"] for record in records if "validation_loss" in record]
    assert validated == [3, 6]
    for record, wanted in zip(records, expected, strict=True):
        if "validation_loss" in wanted:
            assert record["validation_loss"] == pytest.approx(wanted["validation_loss"], abs=1e-5)
    undisturbed = run(pool, f"{SIZE} --train-iters 6 --hidden-dropout 0.1")
    assert largest_difference(expected, undisturbed) == 0


def test_metrics_tell_the_traffic(pool):
    """Bytes per token in attention are those of the exchange's formula, forward and backward, per layer."""
    from helix_megatron.core.exchanges import choose
    from helix_megatron.hardware import CPU

    flags = f"{SIZE} --train-iters 2 {TP} 4 {HELIX} 2 --log-communication-time total"
    settings = validate(parse_args(flags.split()), 4)
    shape = settings.attention_shape
    exchange = choose(shape, machine=CPU)
    record = run(pool, flags, 4)[1]
    tokens = settings.training.micro_batch_size * settings.model.seq_length
    assert (
        record["attention_bytes_per_token"]
        == 2 * settings.model.num_layers * exchange.bytes(shape) / tokens
    )
    assert record["other_bytes_per_token"] > 0
    assert record["comm_ms_per_token"] > 0
    assert record["memory_bytes"] > 1e6
    assert record["consumed_tokens"] == 2 * 4 * 32


def test_megatron_datasets_give_the_same_losses(pool, tmp_path):
    """Tokens of `.bin/.idx`, read by Megatron's GPTDataset, reach every layout alike."""
    from helix_megatron.data.preprocess import main
    from helix_megatron.data.text import default_text

    text = tmp_path / "reference.txt"
    text.write_bytes(default_text()[:60_000])
    prefix = tmp_path / "reference"
    main(["--input", str(text), "--output-prefix", str(prefix), *BY_PARAGRAPH])
    data = f"--data-path {prefix}_text_document --data-cache-path {tmp_path}"
    flags = f"{SIZE} --train-iters 6 --split 90,10,0 --eval-interval 6 --eval-iters 1 {data}"
    expected = run(pool, flags)
    for layout, ranks in (
        (f"{TP} 4 {HELIX} 2 --sequence-parallel", 4),
        (f"{TP} 2 {HELIX} 2 {HALVED}", 4),
    ):
        records = run(pool, f"{flags} {layout}", ranks)
        assert largest_difference(records, expected) <= 1e-5
        assert records[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"])
