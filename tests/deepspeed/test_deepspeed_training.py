"""DeepSpeed engines with the block train as one process without it: 4 ranks, a model with 2 heads."""

from __future__ import annotations

import functools
import math

import deepspeed_runs
import pytest
from deepspeed_runs import ON_2, ON_4, TIMEOUT, Log, Run

FULL = pytest.mark.full("training")
STEPS = 30
MEGATRON = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 12 --micro-batch-size 4 "
    "--global-batch-size 8 --train-iters 5 --max-position-embeddings 32 --attention-dropout 0 "
    "--hidden-dropout 0 --swiglu --normalization RMSNorm --disable-bias-linear --kv-channels 16"
)
DETAILS = (
    f"{MEGATRON} --qk-layernorm --add-qkv-bias --rotary-percent 0.5 "
    "--untie-embeddings-and-output-weights"
)
EXPERTS = f"{MEGATRON} --num-experts 4 --moe-ffn-hidden-size 32 --moe-aux-loss-coeff 0.1"
MEGATRON_ON_4 = "--tensor-model-parallel-size 4 --intra-head-parallel-size 2 --sequence-parallel"


@pytest.fixture(scope="module")
def logs(pool):
    """The log of a run, once per run; all ranks must have the same."""

    @functools.cache
    def run(key: Key, ranks: int) -> Log:
        by_rank = pool.run(deepspeed_runs.train, key.run, world_size=ranks, timeout=TIMEOUT)
        assert all(log == by_rank[0] for log in by_rank), "ranks disagree"
        return by_rank[0]

    return lambda run_, ranks: run(Key(run_), ranks)


class Key:
    """A run is not hashable for its dictionaries; its text is."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __hash__(self) -> int:
        return hash(repr(self.run))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and repr(self.run) == repr(other.run)


def assert_equal(log: Log, reference: Log, tolerance: float = 1e-4) -> None:
    """Losses within the tolerance, gradient norms within it relatively."""
    assert len(log) == len(reference)
    for (loss, norm), (expected_loss, expected_norm) in zip(log, reference, strict=True):
        assert math.isfinite(loss) and norm > 0
        assert abs(loss - expected_loss) <= tolerance
        assert abs(norm - expected_norm) <= tolerance * expected_norm


# ------------------------------------------------------------------------------- fp32


@pytest.fixture(scope="module")
def truth(pool) -> Log:
    """30 steps of plain PyTorch in one process."""
    return pool.run(
        deepspeed_runs.train_with_torch, Run(steps=STEPS), world_size=1, timeout=TIMEOUT
    )[0]


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=FULL), 2])
def test_thirty_steps_equal_one_process(logs, truth, stage):
    """TP 4 with 2 heads: more ranks than heads, which tensor parallelism by heads cannot use."""
    assert_equal(logs(Run(helix=ON_4, stage=stage, steps=STEPS), 4), truth)


def test_the_reference_clips_and_learns(truth):
    """Else the norm's part in the updates would not be seen, nor a model that stands still."""
    assert all(norm > 2 * Run().clip for _, norm in truth)
    assert len({round(loss, 3) for loss, _ in truth}) > STEPS // 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_replicas_of_a_cut_model(logs, truth, stage):
    """TP 2 by DP 2: ZeRO deals states between replicas, and norms are summed over both kinds of groups."""
    run = Run(helix=ON_2, stage=stage, accumulate=2)
    assert_equal(logs(run, 4), truth[: run.steps])


def test_tied_weights(logs):
    """One parameter under two names is cut once."""
    run = Run(model="tied llama")
    assert_equal(logs(run.with_(helix=ON_4, stage=1), 4), logs(run, 1))


# ------------------------------------------------------------------------- bf16, fp16


@pytest.mark.parametrize(
    ("precision", "stage"),
    [
        ("bf16", 0),
        ("fp16", 1),
        *(pytest.param(*case, marks=FULL) for case in (("bf16", 1), ("bf16", 2), ("fp16", 2))),
    ],
)
def test_half_precision_is_within_the_spread_of_unsharded_runs(logs, precision, stage):
    """Rounding makes trajectories differ; the yardstick is how far unsharded ones do that sum in another order.

    At most twice that is allowed, as FlashAttention's tests allow in half precision.

    The distance of two runs is the root mean square over 30 steps. ZeRO 1 and 2 compute the same, so they share
    unsharded runs.
    """
    plain = Run(precision=precision, stage=min(stage, 1), steps=STEPS)
    in_parts = plain.with_(model="llama in parts")
    unsharded = [logs(plain, 1), logs(in_parts, 1), logs(in_parts, 2)]
    log = logs(Run(helix=ON_4, precision=precision, stage=stage, steps=STEPS), 4)
    for column in (0, 1):  # loss, norm
        pairs = [(a, b) for i, a in enumerate(unsharded) for b in unsharded[:i]]
        spread = max(distance(a, b, column) for a, b in pairs)
        assert 0 < spread < 0.01
        assert min(distance(log, other, column) for other in unsharded) <= 2 * spread


def distance(a: Log, b: Log, column: int) -> float:
    """Root mean square of the difference over steps."""
    squares = [(x[column] - y[column]) ** 2 for x, y in zip(a, b, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


def test_the_norm_without_zero_in_half_precision_is_mended(pool):
    """DeepSpeed counts the first rank's parts alone; when this fails, upstream is right and the mend can go."""
    run = Run(helix=ON_4, precision="bf16", steps=1)
    by_rank = pool.run(
        deepspeed_runs.norms_with_and_without_mend, run, world_size=4, timeout=TIMEOUT
    )
    (_, mended), (_, upstream) = by_rank[0]
    ((_, truth),) = pool.run(
        deepspeed_runs.train_with_torch, Run(steps=1), world_size=1, timeout=TIMEOUT
    )[0]
    assert mended == pytest.approx(truth, rel=0.01)
    assert upstream < 0.8 * truth


# ------------------------------------------------------------------------ other models


def test_hugging_face_experts(logs):
    """Mixtral with its load-balancing loss; the whole batch is one micro-batch in both."""
    run = Run(model="mixtral")
    assert_equal(logs(run.with_(helix=ON_4, stage=1), 4), logs(run, 1))


@pytest.mark.parametrize(
    ("plain", "ep_size"),
    [(True, 1), (False, 2), *(pytest.param(*case, marks=FULL) for case in ((True, 2), (False, 1)))],
)
def test_deepspeeds_own_experts(logs, ep_size, plain):
    """TP 2 by DP 2, experts whole (`plain`) or cut like MLPs, dealt to replicas or not."""
    model = deepspeed_runs.deepspeed_moe(plain=plain, ep_size=ep_size)
    run = Run(model=model, helix=ON_2, stage=1, steps=4)
    assert_equal(
        logs(run, 4),
        logs(run.with_(model=deepspeed_runs.deepspeed_moe(plain=plain), helix=None), 1),
    )


@pytest.mark.parametrize("flags", [DETAILS, EXPERTS])
def test_megatron_core_models(logs, flags):
    """Sequence parallelism and query-key norms need sums of gradients that Megatron's own loop makes."""
    run = Run(model=flags, steps=4)
    cut = run.with_(model=f"{flags} {MEGATRON_ON_4}", helix=ON_4, stage=1)
    assert_equal(logs(cut, 4), logs(run, 1))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_megatron_cores_auxiliary_loss_is_scaled(logs, precision):
    """It bypasses the loss that DeepSpeed divides by the micro-batches and multiplies by the scale."""
    run = Run(model=f"scaled {EXPERTS}", steps=4, accumulate=2, stage=1, precision=precision)
    cut = run.with_(model=f"{EXPERTS} {MEGATRON_ON_4}", helix=ON_4)
    tolerance = 1e-4 if precision == "fp32" else 5e-3
    assert_equal(logs(cut, 4), logs(run, 1), tolerance)
