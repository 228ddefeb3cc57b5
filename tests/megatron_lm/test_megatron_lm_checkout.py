"""A real Megatron-LM checkout's pretrain_gpt.py, unmodified, on CPU ranks with mock data.

    HELIX_MEGATRON_LM=PATH pytest tests/megatron_lm/test_megatron_lm_checkout.py

Needs what that version needs: six, regex, pyyaml, pydantic, tqdm, einops; from 0.18 on Python 3.12 and triton.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from waiting import PROGRAM_LIMIT

from helix_megatron import doctor
from helix_megatron.megatron_lm import patch
from helix_megatron.megatron_lm.source import core_version, entry_point

CHECKOUT = os.environ.get("HELIX_MEGATRON_LM", "")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="HELIX_MEGATRON_LM does not name a checkout of Megatron-LM"
)
# Words of a command line, split below.
MODEL_FLAGS = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --num-layers 2 --hidden-size 64
    --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1
    --global-batch-size 4 --lr 1e-3 --lr-decay-style constant --lr-decay-iters 100 --log-interval 1
    --eval-iters 0 --eval-interval 1000 --position-embedding-type rope --attention-dropout 0
    --hidden-dropout 0 --split 100,0,0 --num-workers 0 --train-iters 6
"""
MOE_FLAGS = """
    --num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --disable-bias-linear
    --moe-token-dispatcher-type alltoall
"""
MODEL, MOE = MODEL_FLAGS.split(), MOE_FLAGS.split()
LOGGED = re.compile(r"iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+) ")
SAME_MODEL = ["--helix-layout-free-init", "--exit-interval", "3"]
# Megatron-LM on the CPU without any hook of Helix.
STOCK = """
import os, sys
sys.argv = sys.argv[1:]
if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    from helix_megatron.megatron_lm import cpu
    cpu.install()
    code = compile(open(sys.argv[0]).read(), sys.argv[0], "exec")
    exec(code, {"__name__": "__main__", "__file__": sys.argv[0]})
"""


def torchrun(ranks: int, *command: object, path: object = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        + [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(path)},
    )


def flags(tensor: int, segments: int = 1) -> list[str]:
    """Megatron pads the vocabulary to a multiple of this times the tensor parallel size: here to 128."""
    words = f"--tensor-model-parallel-size {tensor} --make-vocab-size-divisible-by {128 // tensor}"
    return words.split() + (["--intra-head-parallel-size", str(segments)] if segments > 1 else [])


def train(
    ranks: int, *given: object, script: str = "pretrain_gpt.py"
) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) by iteration."""
    return logged(
        torchrun(ranks, "-m", "helix_megatron.launch", Path(CHECKOUT, script), *MODEL, *given)
    )


def logged(done: subprocess.CompletedProcess[str]) -> dict[int, tuple[float, float]]:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    text = done.stdout + done.stderr
    return {int(i): (float(loss), float(norm)) for i, loss, norm in LOGGED.findall(text)}


def test_the_doctor_finds_every_hook_point(capsys) -> None:
    """What the doctor reads must be what the launcher finds in the tests below."""
    assert doctor.main(["--megatron", CHECKOUT]) == 0, capsys.readouterr().out
    text = capsys.readouterr().out
    assert "missing" not in text and "bypassed" not in text


@pytest.mark.skipif(
    not Path(CHECKOUT, "pretrain_hybrid.py").is_file(),
    reason="the checkout has no pretrain_hybrid.py, which Megatron-LM has from core_v0.18 on",
)
def test_a_hybrid_model_has_the_losses_of_one_rank() -> None:
    """Its stack is Transformer Engine's, which cannot be built here; its attention is cut all the same."""
    spec = "megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"
    given = [*SAME_MODEL, "--hybrid-layer-pattern", "*-", "--spec", *spec.split()]
    one, many = (
        train(ranks, *given, *flags(ranks, m), script="pretrain_hybrid.py")
        for ranks, m in ((1, 1), (4, 2))
    )
    assert sorted(one) == [1, 2, 3]
    for iteration, (loss, norm) in one.items():
        assert many[iteration] == (pytest.approx(loss, abs=1e-5), pytest.approx(norm, abs=2e-3))


@pytest.mark.parametrize(
    "given",
    [
        [*flags(4, 2)],
        [*flags(4, 2), "--sequence-parallel"],
        [*flags(2, 2), "--pipeline-model-parallel-size", "2"],
        [*flags(2, 2), "--use-distributed-optimizer"],
        [*flags(2, 2), "--context-parallel-size", "2"],
    ],
    ids=["tp4", "tp4-sp", "tp2-pp2", "tp2-dp2", "tp2-cp2"],
)
def test_losses_are_those_of_one_rank(given) -> None:
    """Tensor parallelism above the two heads of the model, with everything that is combined with it."""
    one, many = train(1, *SAME_MODEL), train(4, *SAME_MODEL, *given)
    assert sorted(one) == sorted(many) == [1, 2, 3]
    for iteration, (loss, norm) in one.items():
        assert many[iteration] == (
            pytest.approx(loss, abs=1e-5),
            pytest.approx(norm, abs=2e-3),  # printed with three digits
        )


def test_mixture_of_experts() -> None:
    """Experts over two ranks, their attention over four."""
    parallel = ["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
    one = train(1, *SAME_MODEL, *MOE)
    many = train(4, *SAME_MODEL, *MOE, *flags(4, 2), *parallel, "--sequence-parallel")
    assert len(one) == 3
    for iteration, (loss, _) in one.items():
        assert many[iteration][0] == pytest.approx(loss, abs=1e-5)


def test_checkpoints_go_from_one_layout_to_another(tmp_path) -> None:
    """Weights and optimizer: TP 1 to TP 4 with two heads, and back.

    After a resume upstream logs, as its second loss, the mean of the first two.
    """
    save = ["--save-interval", "2", "--save"]
    train(1, *save, tmp_path / "one", "--exit-interval", "2")
    stock = train(1, "--load", tmp_path / "one")
    four = ["--load", tmp_path / "one", *save, tmp_path / "four", "--exit-interval", "4"]
    helix = train(4, *flags(4, 2), *four)
    back = train(1, "--load", tmp_path / "four")
    assert (sorted(stock), sorted(helix), sorted(back)) == ([3, 4, 5, 6], [3, 4], [5, 6])
    for iteration in helix:
        assert helix[iteration][0] == pytest.approx(stock[iteration][0], abs=1e-5)
    assert back[5][0] == pytest.approx(stock[5][0], abs=1e-5)
    assert back[6][0] == pytest.approx((stock[5][0] + stock[6][0]) / 2, abs=1e-5)
    for file in (tmp_path / "four").rglob("*"):
        assert file.is_dir() or b"helix_megatron" not in file.read_bytes(), (
            "stock could not read it"
        )


def test_without_the_flag_nothing_differs(tmp_path) -> None:
    """Losses, and every bit of weights and optimizer, are those of Megatron-LM without Helix.

    Tensors are compared, not files: these also hold the arguments from 0.19 on, the path of the save among
    them.
    """
    driver = tmp_path / "stock.py"
    driver.write_text(STOCK)
    script = Path(CHECKOUT, "pretrain_gpt.py")
    given = [script, *MODEL, *flags(2), "--exit-interval", "2", "--save-interval", "2", "--save"]
    stock = logged(torchrun(2, driver, *given, tmp_path / "stock"))
    helix = logged(torchrun(2, "-m", "helix_megatron.launch", *given, tmp_path / "helix"))
    assert stock == helix and len(stock) == 2
    expected, found = tensors(tmp_path / "stock"), tensors(tmp_path / "helix")
    assert set(expected) == set(found) and len(expected) > 20
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def tensors(store: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint of iteration 2."""
    reader = FileSystemReader(store / "iter_0000002")
    kept = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(kept, storage_reader=reader, no_dist=True)
    return kept


def test_a_patched_script_trains_without_the_launcher(tmp_path) -> None:
    """The fork's way: two lines of ours in its own pretrain_gpt.py."""
    version = core_version(Path(CHECKOUT))[:2]
    if version < (0, 17):
        pytest.importorskip(
            "triton", reason="0.16 imports triton before a patched script says anything"
        )
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(Path(CHECKOUT, "pretrain_gpt.py").read_text())
    line = entry_point(script)
    assert line is not None
    (tmp_path / "helix.patch").write_text(patch.patch_text(line))
    subprocess.run(["git", "apply", "--unidiff-zero", "helix.patch"], cwd=tmp_path, check=True)
    patched = logged(torchrun(4, script, *MODEL, *SAME_MODEL, *flags(4, 2), path=CHECKOUT))
    assert patched == train(4, *SAME_MODEL, *flags(4, 2))
