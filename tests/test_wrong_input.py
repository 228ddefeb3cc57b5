"""Wrong input: one paragraph with the values, the valid values, what to try; exit code 2, no rank started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.cpp_extension  # noqa: F401 - says once, when imported, that there is no GPU
from waiting import PROGRAM_LIMIT

from helix_megatron.training.pretrain import main

ROOT = Path(__file__).parent.parent
FOUR = "--nproc-per-node 4 --tensor-model-parallel-size 4"
HELIX = "--intra-head-parallel-size"

WRONG = {
    "key-value heads and ranks": (
        f"{FOUR} --num-attention-heads 12 --hidden-size 48 --group-query-attention --num-query-groups 3",
        "3 key-value heads cannot be dealt to 4 tensor parallel ranks, nor copied to an equal number of them. "
        "Valid --tensor-model-parallel-size for 12 query heads: 1, 3, 6, 12.",
    ),
    "no expert tensor parallel rank": (
        f"{FOUR} {HELIX} 2 --num-experts 4 --sequence-parallel --expert-tensor-parallel-size 0",
        "--expert-tensor-parallel-size is 0. It must be a whole number of at least 1.",
    ),
    "experts with biases cut": (
        f"{FOUR} {HELIX} 2 --num-experts 4 --sequence-parallel",
        "Megatron cannot cut experts with biases for 4 tensor parallel ranks. Add --disable-bias-linear, or "
        "deal whole experts to ranks: --expert-model-parallel-size 4.",
    ),
    "copies of experts": (
        "--nproc-per-node 2 --tensor-model-parallel-size 2 --num-experts 4 --sequence-parallel "
        "--expert-tensor-parallel-size 1",
        "--expert-tensor-parallel-size 1 makes copies of every expert on 2 tensor parallel ranks, and Megatron "
        "does not sum their gradients. Leave it out to cut experts, with --disable-bias-linear, or deal whole "
        "ones: --expert-model-parallel-size 2.",
    ),
    "steps beyond fp32": (
        "--lr 1e36 --weight-decay 1e4",
        "--lr 1e+36 with --adam-beta1 0.9 and --weight-decay 10000 makes steps beyond the numbers of fp32.",
    ),
    "a learning rate beyond fp32": (
        "--lr 3e38",
        "--lr is 3e+38. The largest valid value is 1e+36.",
    ),
    "warm-up as long as the run": (
        "--train-iters 10 --lr-warmup-iters 10",
        "--lr-warmup-iters 10 must be less than --lr-decay-iters, which is 10",
    ),
    "heads not divisible by n": (
        f"{FOUR} {HELIX} 2 --num-attention-heads 5 --hidden-size 80",
        "5 heads cannot form 2 head groups. Valid numbers of groups: 1, 5. "
        "With 4 ranks try --intra-head-parallel-size 4.",
    ),
    "n not dividing the key-value heads": (
        f"{FOUR} {HELIX} 1 --num-attention-heads 4 --group-query-attention --num-query-groups 1 "
        "--intra-head-parallel-size 2",
        "1 key-value head cannot form 2 head groups: a key-value head would be split among groups. "
        "Valid numbers of groups: 1. With 4 ranks try --intra-head-parallel-size 4.",
    ),
    "head dim not divisible by m": (
        f"{FOUR} {HELIX} 4 --num-attention-heads 2 --kv-channels 18 --num-query-groups 1",
        "a head of 18 dimensions cannot be cut into 4 equal segments. "
        "Valid numbers of segments: 1, 3, 9.",
    ),
    "odd segment under rotary": (
        f"{FOUR} {HELIX} 2 --num-attention-heads 2 --kv-channels 6",
        "2 segments of a head of 6 dimensions would split a rotary pair: 3 pairs cannot be dealt evenly. "
        "Valid numbers of segments: 1, 3.",
    ),
    "m not dividing TP": (
        f"{FOUR} {HELIX} 3",
        "intra-head parallel size 3 does not divide the tensor parallel size 4. Valid: 1, 2, 4. Or change "
        "--tensor-model-parallel-size to a multiple of it.",
    ),
    "more ranks than heads without m": (
        FOUR,
        "2 heads cannot be dealt to 4 tensor parallel ranks. Valid --tensor-model-parallel-size without "
        "cutting heads: 1, 2. Or cut them: try --intra-head-parallel-size 2.",
    ),
    "batch too small for all-to-all over batch": (
        f"{FOUR} {HELIX} 2 --helix-exchange all-to-all-batch --micro-batch-size 1",
        "exchange all-to-all-batch does not fit here (all-to-all-batch: a micro-batch of 1 cannot be dealt "
        "to 2 ranks; it must be a multiple of 2). Valid here:",
    ),
    "an exchange that does not fit": (
        f"{FOUR} {HELIX} 2 --helix-exchange gather-kv",
        "exchange gather-kv does not fit here (gather-kv: it needs query layout heads, and this is "
        "segments). Valid here:",
    ),
    "a query layout that does not fit": (
        f"{FOUR} {HELIX} 2 --helix-query-layout heads",
        "query layout heads deals the 1 query heads of a head group whole to 2 ranks, which needs the "
        "number of query heads (2) to be divisible by m·n = 4. Try --helix-query-layout segments.",
    ),
    "segment-local with an exchange": (
        f"{FOUR} {HELIX} 2 --helix-attention segment-local --helix-exchange gather-qk",
        "segment-local attention exchanges nothing, so exchange gather-qk has no meaning.",
    ),
    "missing text file": ("--text no/such/file.txt", "no/such/file.txt"),
    "empty text": ("--text {empty}", "is empty"),
    "short text": (
        "--text {short}",
        "the training text has 17 bytes, too few for sequence length 128: a sample takes 129.",
    ),
    "missing .idx": ("--data-path {tmp}/nothing --tokenizer-type byte", "nothing"),
    "corrupt .idx": ("--data-path {corrupt} --tokenizer-type byte", "corrupt.idx"),
    "text and data path": (
        "--text {empty} --data-path {corrupt}",
        "--text and --data-path exclude each other. Leave one out.",
    ),
    "too few ranks": (
        "--nproc-per-node 3 --tensor-model-parallel-size 2 --intra-head-parallel-size 2",
        "3 ranks cannot hold tensor parallel size 2 times pipeline parallel size 1: their number must be a "
        "multiple of 2. Start 4 ranks",
    ),
    "batch arithmetic": (
        "--micro-batch-size 4 --global-batch-size 6",
        "--global-batch-size 6 is not a multiple of --micro-batch-size 4 times 1 data parallel rank = 4. "
        "Try 8.",
    ),
    "sequence parallel alone": (
        "--sequence-parallel",
        "--sequence-parallel cuts the sequence over",
    ),
    "sequence not divisible": (
        f"{FOUR} {HELIX} 2 --sequence-parallel --seq-length 30",
        "--seq-length 30 does not divide by the 4 tensor parallel ranks, which --sequence-parallel needs. "
        "Try 32.",
    ),
    "layers and stages": (
        "--nproc-per-node 3 --pipeline-model-parallel-size 3",
        "4 layers cannot be dealt to 3 pipeline stages. Valid --pipeline-model-parallel-size: 1, 2, 4.",
    ),
    "MoE without sequence parallelism": (
        f"{FOUR} {HELIX} 2 --num-experts 4",
        "Megatron trains a mixture of experts on several tensor parallel ranks only with "
        "--sequence-parallel. Add it.",
    ),
    "experts and ranks": (
        f"{FOUR} {HELIX} 2 --num-experts 6 --expert-model-parallel-size 4 --sequence-parallel",
        "6 experts cannot be dealt to 4 ranks. Valid --expert-model-parallel-size: 1, 2, 3, 6.",
    ),
    "expert parallel without experts": (
        "--expert-model-parallel-size 2",
        "--expert-model-parallel-size 2 deals experts to ranks, and the model has none.",
    ),
    "context parallelism and ranks": (
        "--nproc-per-node 3 --context-parallel-size 2",
        "3 ranks cannot hold tensor parallel size 1 times pipeline parallel size 1 times context parallel "
        "size 2: their number must be a multiple of 2. Start 4 ranks",
    ),
    "chunks of a sequence": (
        "--nproc-per-node 4 --context-parallel-size 4 --seq-length 36",
        "--seq-length 36 cannot be cut into 2 chunks for each of 4 context parallel ranks. Try 40,",
    ),
    "sequence over context and tensor parallel ranks": (
        "--nproc-per-node 12 --context-parallel-size 2 --seq-length 32 --sequence-parallel "
        "--tensor-model-parallel-size 6 --num-attention-heads 6 --kv-channels 8",
        "--seq-length 32 does not divide by the 6 tensor parallel ranks of each of 2 context parallel ranks, "
        "which --sequence-parallel needs. Try 36.",
    ),
    "communication of one context rank": (
        "--cp-comm-type all_gather",
        "--cp-comm-type all_gather is for context parallel ranks, and there is one. Leave it out,",
    ),
    "packed documents, context and pipeline": (
        "--packed-documents --data-path x --nproc-per-node 4 --context-parallel-size 2 "
        "--pipeline-model-parallel-size 2",
        "--packed-documents with --context-parallel-size 2 makes rows of different lengths, and 2 pipeline",
    ),
    "packed text": (
        "--packed-documents",
        "--packed-documents needs the documents of --data-path: text is one long sequence.",
    ),
    "both half precisions": (
        "--bf16 --fp16",
        "--bf16 and --fp16 exclude each other. Leave one out.",
    ),
    "heads and hidden size": (
        "--hidden-size 100 --num-attention-heads 3",
        "--hidden-size 100 does not divide into --num-attention-heads 3. Valid numbers of heads: 1, 2, 4, "
        "5, 10, 20, 25, 50, 100. Or give --kv-channels.",
    ),
    "zero layers": (
        "--num-layers 0",
        "--num-layers is 0. It must be a whole number of at least 1.",
    ),
    "not a number": ("--lr nan", "--lr is nan. It must be a finite number of at least 0."),
    "learning rates": ("--lr 1e-3 --min-lr 1e-2", "--min-lr 0.01 is above --lr 0.001."),
    "clipping": (
        "--clip-grad -1",
        "--clip-grad is -1.0. It must be a finite number of at least 0.",
    ),
    "weight decay": ("--weight-decay -1", "--weight-decay is -1.0. It must be"),
    "beta": ("--adam-beta1 2", "It must be a finite number of at least 0 and below 1."),
    "loss scale": (
        "--fp16 --loss-scale 0",
        "--loss-scale is 0.0. It must be a finite number above 0.",
    ),
    "dropout": ("--hidden-dropout 1", "--hidden-dropout is 1.0. It must be"),
    "epsilon": ("--norm-epsilon 0", "--norm-epsilon is 0.0. It must be a finite number above 0."),
    "odd rotary dimensions": ("--kv-channels 7", "7 of the 7 dimensions of a head (--kv-channels,"),
    "router loss": ("--num-experts 2 --moe-aux-loss-coeff -1", "--moe-aux-loss-coeff is -1.0."),
    "split": ("--split a,b", "--split"),
    "seed": ("--seed 0", "--seed is 0. It must be a whole number of at least 1."),
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_bytes(b"to be or not to be")
    (tmp_path / "corrupt.idx").write_bytes(b"MMIDIDX\x00\x00" + b"\xff" * 40)
    (tmp_path / "corrupt.bin").write_bytes(b"\x00" * 64)
    return {
        "{empty}": str(tmp_path / "empty.txt"),
        "{short}": str(tmp_path / "short.txt"),
        "{corrupt}": str(tmp_path / "corrupt"),
        "{tmp}": str(tmp_path),
    }


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_paragraph_and_exit_code_2(name, files, capsys, monkeypatch):
    """Must fail before a rank starts: starting one is an error here."""
    flags, text = WRONG[name]
    for placeholder, path in files.items():
        flags = flags.replace(placeholder, path)
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr("helix_megatron.training.pretrain.pretrain", started.append)
    with pytest.raises(SystemExit) as end:
        main(flags.split())
    assert end.value.code == 2
    assert not started
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.startswith("pretrain_gpt.py: error:")
    assert "\n\n" not in message.strip(), "one paragraph"
    assert text in re.sub(r"\s+", " ", message)


def test_unknown_flag(capsys):
    """A mistyped flag must not be ignored, nor be taken for an abbreviation."""
    for flags in ("--intra-head-parallel 2", "--helix-exchanges auto", "--helix-exchange gather"):
        with pytest.raises(SystemExit) as end:
            main(flags.split())
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert "unrecognized arguments" in error or "invalid choice: 'gather'" in error


@pytest.mark.parametrize("launcher", [False, True])
def test_exit_code_of_the_script_itself(launcher):
    """As a user sees it: the script's own status, alone and on a rank that a launcher has started."""
    environment = dict(os.environ)
    flags = ["--tensor-model-parallel-size", "4", "--intra-head-parallel-size", "3"]
    if launcher:
        environment |= {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    else:
        flags += ["--nproc-per-node", "4"]
    ended = subprocess.run(
        [sys.executable, ROOT / "scripts" / "pretrain_gpt.py", *flags],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=PROGRAM_LIMIT,
    )
    assert ended.returncode == 2
    assert ("does not divide" in ended.stderr) == (not launcher), "only the first rank speaks"


def test_check_explains_and_starts_nothing(capsys):
    """`--check --explain` shows who holds what, and why the exchange was chosen."""
    main(f"{FOUR} {HELIX} 2 --check --explain".split())
    shown = capsys.readouterr().out
    assert "Attention: exact, 2 head groups of 2 segments, query layout segments." in shown
    assert (
        "tensor parallel rank 3: query heads 1-1 (segment 1), segment 1 of key-value heads 1-1"
        in shown
    )
    assert "<- chosen" in shown
    assert "not here: it needs query layout heads" in shown


@pytest.mark.parametrize("preset", ["paper-dense", "paper-moe"])
def test_presets_at_full_size_are_valid_for_16_ranks(preset, capsys, monkeypatch):
    """The full-size commands can be checked on any machine."""
    monkeypatch.setenv("WORLD_SIZE", "16")
    main(["--preset", preset, "--check"])
    assert "Attention: exact, 4 head groups of 4 segments" in capsys.readouterr().out
