"""Training with context-parallel ranks, and on packed documents, gives the losses of one process."""

from __future__ import annotations

import functools
import math

import pytest
from pool import RankError
from test_training import EXPERTS, GQA, HALVED, HELIX, PP, SIZE, TP, largest_difference, run
from tiers import sized

from helix_megatron.errors import HelixError
from helix_megatron.training.arguments import parse_args
from helix_megatron.training.validate import validate

CP = "--context-parallel-size"
SP = "--sequence-parallel"
CUT = "--helix-query-layout segments --helix-exchange"
ITERATIONS = sized("training", full=20, quick=4)

# name: (model, ranks, layout)
LAYOUTS = {
    "stock, CP 2": ("", 2, f"{CP} 2"),
    "stock, CP 4, learned positions": ("--position-embedding-type learned_absolute", 4, f"{CP} 4"),
    "stock, CP 2, DP 2, distributed optimizer": (
        GQA,
        4,
        f"{CP} 2 {HALVED} --use-distributed-optimizer",
    ),
    "stock, CP 2, PP 2, recompute": (
        GQA,
        4,
        f"{CP} 2 {PP} 2 {HALVED} --recompute-granularity selective",
    ),
    "(1,2), CP 2": (GQA, 4, f"{TP} 2 {HELIX} 2 {CP} 2"),
    "(2,2), CP 2": (GQA, 8, f"{TP} 4 {HELIX} 2 {CP} 2 {SP}"),
    "(1,2), CP 2, queries cut, gather-qk": (GQA, 4, f"{TP} 2 {HELIX} 2 {CP} 2 {CUT} gather-qk"),
    "(1,2), CP 2, queries cut, all-to-all-heads": (
        GQA,
        4,
        f"{TP} 2 {HELIX} 2 {CP} 2 {CUT} all-to-all-heads",
    ),
    "(1,2), CP 2, queries cut, all-to-all-sequence": (
        GQA,
        4,
        f"{TP} 2 {HELIX} 2 {CP} 2 {CUT} all-to-all-sequence",
    ),
    "MoE, TP 2, CP 2": (EXPERTS, 4, f"{TP} 2 {SP} {CP} 2"),
    "MoE, (1,2), CP 2": (EXPERTS, 4, f"{TP} 2 {HELIX} 2 {CP} 2 {SP}"),
    "MoE, (2,2), CP 2": (EXPERTS, 8, f"{TP} 4 {HELIX} 2 {CP} 2 {SP}"),
}
IN_FULL_TIER = {
    "stock, CP 2",
    "(2,2), CP 2",
    "(1,2), CP 2, queries cut, all-to-all-heads",
    "(1,2), CP 2, queries cut, all-to-all-sequence",
    "MoE, TP 2, CP 2",
    "MoE, (2,2), CP 2",
}
assert set(LAYOUTS) >= IN_FULL_TIER, "a layout was renamed"


@pytest.fixture(scope="module")
def reference(pool):
    """A model's run in one process with stock attention, once per model."""
    return functools.cache(lambda model: run(pool, f"{SIZE} --train-iters {ITERATIONS} {model}"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.full("training")] * (name in IN_FULL_TIER))
        for name in LAYOUTS
    ],
)
def test_context_parallel_losses_are_those_of_one_process(pool, reference, name):
    """Positions, masks, losses and gradients are right on every rank, or training would drift at once."""
    model, ranks, layout = LAYOUTS[name]
    expected = reference(model)
    records = run(pool, f"{SIZE} --train-iters {ITERATIONS} {model} {layout}", ranks)
    assert len(records) == ITERATIONS
    assert len({record["lm_loss"] for record in expected}) == ITERATIONS, "nothing was trained"
    assert largest_difference(records, expected) <= 1e-5
    norms = [[record["grad_norm"] for record in of] for of in (records, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("layout", [f"{CP} 2", f"{TP} 2 {SP} {CP} 2"])
def test_hidden_dropout_does_not_depend_on_context_parallelism(pool, layout):
    """The same seed drops the same hidden states, whichever rank holds the position."""
    flags = f"{SIZE} --train-iters 3 --hidden-dropout 0.2"
    ranks = 4 if TP in layout else 2
    assert largest_difference(run(pool, f"{flags} {layout}", ranks), run(pool, flags)) <= 1e-5


def test_attention_dropout_trains(pool):
    """Dropped attention weights change the losses, and leave them finite and equal on all ranks."""
    flags = f"{SIZE} --train-iters 3 {CP} 2"
    dropped = run(pool, f"{flags} --attention-dropout 0.3", 2)
    assert all(math.isfinite(record["lm_loss"]) for record in dropped)
    assert largest_difference(dropped, run(pool, flags, 2)) > 1e-4


def test_only_all_gather_communicates_without_transformer_engine(pool):
    """Another way is Transformer Engine's: it is refused by name, not replaced in silence."""
    flags = f"{SIZE} --train-iters 1 {CP} 2"
    with pytest.raises(RankError, match=r"by all_gather without Transformer Engine, and p2p is"):
        run(pool, f"{flags} --cp-comm-type p2p", 2)
    assert len(run(pool, f"{flags} --cp-comm-type all_gather", 2)) == 1


def test_metrics_count_the_gathered_keys(pool):
    """What attention gathers counts as attention's: forward and backward, keys and values, per layer."""
    record = run(pool, f"{SIZE} --train-iters 1 {GQA} {CP} 2", 2)[0]
    heads, dim, layers, size = 2, 8, 2, 4
    # Each rank sends its half of a sequence's keys and values, and later as much of their gradients.
    per_token = layers * 2 * heads * dim * size / 2
    assert record["attention_bytes_per_token"] == 2 * per_token
    assert record["consumed_tokens"] == 4 * 32


# ---------------------------------------------------------------------------- packed documents


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Flags of short documents with their ends; most samples hold the ends of several."""
    from helix_megatron.data.preprocess import main
    from helix_megatron.data.text import default_text

    directory = tmp_path_factory.mktemp("documents")
    text = directory / "lines.txt"
    lines = [line for line in default_text()[:40_000].split(b"\n") if line.strip()]
    text.write_bytes(b"\n\n".join(line[: 1 + 7 * at % 23] for at, line in enumerate(lines)))
    words = ["--tokenizer-type", "byte", "--split-documents", "blank-line", "--append-eod"]
    main(["--input", str(text), "--output-prefix", str(directory / "lines"), *words])
    prefix = directory / "lines_text_document"
    return f"--data-path {prefix} --data-cache-path {directory} --split 90,10,0"


def train_unpacked(flags: str) -> list[dict[str, float]]:
    """A run of packed documents, each of which is a row of its own instead, padded, in stock attention."""
    from unittest import mock

    import torch
    from test_training import train

    from helix_megatron.training.micro_batch import OwnBatch, documents_in

    def own_batch(batch, *, packs, unit):
        assert packs
        parts = documents_in(batch["position_ids"], 1, 1)
        assert len(parts) > len(batch["tokens"]), "no sample ends a document"
        rows = torch.zeros(len(parts), batch["tokens"].size(1), dtype=torch.long)
        own = {name: rows.to(x.dtype, copy=True) for name, x in batch.items()}
        own["position_ids"] = rows + torch.arange(rows.size(1))
        for name, x in batch.items():
            if name != "position_ids":
                for row, (start, stop, length) in enumerate(parts):
                    own[name][row, :length] = x.flatten()[start:stop]
        return OwnBatch(own, own["loss_mask"].sum())

    with (
        mock.patch("helix_megatron.training.loop.own_batch", own_batch),
        mock.patch("helix_megatron.megatron.gpt.context_spec", lambda spec: spec),
    ):
        return train(flags, 1)


PACKED = {
    "one process": (1, ""),
    "CP 2": (2, f"{CP} 2"),
    "TP 2, CP 2": (4, f"{TP} 2 {SP} {CP} 2"),
    "PP 2, DP 2": (4, f"{PP} 2 {HALVED}"),
    "(1,2)": (2, f"{TP} 2 {HELIX} 2"),
    "(1,2), CP 2": (4, f"{TP} 2 {HELIX} 2 {SP} {CP} 2"),
    "(1,2), queries cut, score-reduce": (2, f"{TP} 2 {HELIX} 2 {CUT} score-reduce"),
}
PACKED_IN_FULL_TIER = {"TP 2, CP 2", "(1,2), queries cut, score-reduce"}
assert set(PACKED) >= PACKED_IN_FULL_TIER, "a layout was renamed"
POSITIONS = {
    "rotary": f"{GQA} --rotary-percent 0.5",
    "learned": "--position-embedding-type learned_absolute --window-size 6",
}


@pytest.fixture(scope="module")
def unpacked(pool, documents):
    """The losses of a model whose documents are rows of their own, once per model."""
    return functools.cache(
        lambda model: pool.run(train_unpacked, packed(model, documents), world_size=1)[0]
    )


def packed(model: str, documents: str) -> str:
    validates = "--eval-interval 3 --eval-iters 1"
    return f"{SIZE} --train-iters 3 {validates} {model} {documents} --packed-documents"


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.full("training")] * (name in PACKED_IN_FULL_TIER))
        for name in PACKED
    ],
)
def test_packed_documents_train_as_sequences_of_their_own(
    pool, documents, unpacked, name, positions
):
    """No attention across documents, positions that restart, no loss for the next document's first token."""
    ranks, layout = PACKED[name]
    flags = packed(POSITIONS[positions], documents)
    expected = unpacked(POSITIONS[positions])
    records = run(pool, f"{flags} {layout}", ranks)
    if layout.endswith(
        HALVED
    ):  # the mean of micro-batches' means, each over its own number of tokens
        expected = run(pool, f"{flags} {HALVED}")
    assert largest_difference(records, expected) <= 1e-6
    validated = [of[-1]["validation_loss"] for of in (records, expected)]
    assert validated[0] == pytest.approx(validated[1], abs=1e-6)


def test_packing_changes_the_model(pool, documents):
    """The flag does something: without it documents see those before them in the sample."""
    flags = packed(POSITIONS["rotary"], documents)
    plain = run(pool, flags.replace(" --packed-documents", ""))
    assert largest_difference(run(pool, flags), plain) > 1e-3


def test_documents_without_an_end_are_refused(tmp_path):
    """Without the token that ends a document all would be one, and nobody would notice."""
    from helix_megatron.data.preprocess import main

    text = tmp_path / "one.txt"
    text.write_text("a line\n\nanother line\n" * 50)
    words = ["--tokenizer-type", "byte", "--split-documents", "blank-line"]
    main(["--input", str(text), "--output-prefix", str(tmp_path / "one"), *words])
    flags = f"{SIZE} --packed-documents --data-path {tmp_path / 'one_text_document'} --split 1"
    with pytest.raises(
        HelixError, match=r"does not end with the end-of-document token 256.*append-eod"
    ):
        validate(parse_args(flags.split()), 1)
