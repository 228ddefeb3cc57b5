"""Training with context-parallel ranks, and on packed documents, gives the losses of one process."""

from __future__ import annotations

import functools

import pytest
from test_training import EXPERTS, GQA, HALVED, PP, SIZE, TP, largest_difference, run
from tiers import sized

CP = "--context-parallel-size"
SP = "--sequence-parallel"
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
    "MoE, TP 2, CP 2": (EXPERTS, 4, f"{TP} 2 {SP} {CP} 2"),
}


@pytest.fixture(scope="module")
def reference(pool):
    """A model's run in one process with stock attention, once per model."""
    return functools.cache(lambda model: run(pool, f"{SIZE} --train-iters {ITERATIONS} {model}"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_context_parallel_losses_are_those_of_one_process(pool, reference, name):
    """Positions, masks, losses and gradients are right on every rank, or training would drift at once."""
    model, ranks, layout = LAYOUTS[name]
    expected = reference(model)
    records = run(pool, f"{SIZE} --train-iters {ITERATIONS} {model} {layout}", ranks)
    assert len(records) == ITERATIONS
    assert expected[0]["lm_loss"] - expected[-1]["lm_loss"] > 0.1, "nothing was learned"
    assert largest_difference(records, expected) <= 1e-5
    norms = [[record["grad_norm"] for record in of] for of in (records, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


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
        mock.patch("helix_megatron.training.model.context_spec", lambda spec: spec),
    ):
        return train(flags, 1)


PACKED = {
    "one process": (1, ""),
    "CP 2": (2, f"{CP} 2"),
    "TP 2, CP 2": (4, f"{TP} 2 {SP} {CP} 2"),
    "PP 2, DP 2": (4, f"{PP} 2 {HALVED}"),
}
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
@pytest.mark.parametrize("name", PACKED)
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
