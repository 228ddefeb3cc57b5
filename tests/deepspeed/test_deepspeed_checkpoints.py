"""Checkpoints of engines with the block: exact resume, no mixing of layouts, whole weights again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed_runs
import numpy as np
import pytest
import torch
from deepspeed_runs import ON_2, ON_4, TIMEOUT, Run
from malicious import PAYLOADS
from pool import RankError
from tiny_checkpoints import build, flags_of, whole_model

from helix_megatron.checkpoint.partition import RankLayout
from helix_megatron.checkpoint.rank_io import RankReader, StageFiles
from helix_megatron.config import HelixConfig
from helix_megatron.deepspeed.checkpoints import CONVERTED, FILE
from helix_megatron.deepspeed.merge import merge_checkpoint
from helix_megatron.errors import HelixError

RUN = Run(helix=ON_2, stage=1, steps=4)


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """A run that saved after two steps: (directory, log, whole weights at that time)."""
    directory = tmp_path_factory.mktemp("deepspeed")
    log, whole = pool.run(
        deepspeed_runs.train_and_save, RUN, str(directory), 2, world_size=4, timeout=TIMEOUT
    )[0]
    return directory, log, whole


def test_training_goes_on_as_if_nothing_had_happened(pool, saved):
    """Same bits: weights, Adam's moments, step counts and scales are all there."""
    directory, log, _ = saved
    assert (
        pool.run(deepspeed_runs.resume, RUN, str(directory), world_size=4, timeout=TIMEOUT)[0]
        == log[2:]
    )


@pytest.mark.parametrize(
    ("stage", "precision", "model"),
    [(0, "fp32", "llama"), (0, "bf16", "tied llama"), (2, "fp16", "mixtral"), (3, "fp32", "llama")],
)
def test_exact_resume_at_other_stages(pool, tmp_path, stage, precision, model):
    """Each stage keeps its states elsewhere."""
    run = Run(helix=ON_2, stage=stage, precision=precision, model=model, steps=3)
    path = str(tmp_path)
    log, _ = pool.run(deepspeed_runs.train_and_save, run, path, 2, world_size=4, timeout=TIMEOUT)[0]
    assert pool.run(deepspeed_runs.resume, run, path, world_size=4, timeout=TIMEOUT)[0] == log[2:]
    if stage < 3:  # whatever DeepSpeed keeps beside the weights, it is read without trust
        assert all(tensor.isfinite().all() for tensor in merge_checkpoint(path).values())


# --------------------------------------------------------------------------- merging


def test_merged_weights_are_the_whole_models(saved):
    """Bit for bit what the ranks held together, under all names."""
    directory, _, whole = saved
    merged = merge_checkpoint(directory)
    assert merged.keys() == whole.keys()
    for name, tensor in merged.items():
        np.testing.assert_array_equal(tensor.numpy(), whole[name], err_msg=name)


def test_the_command_writes_what_plain_transformers_loads(saved, tmp_path):
    """The documented way out of Helix."""
    directory, _, whole = saved
    output = tmp_path / "model.safetensors"
    command = [sys.executable, "-m", "helix_megatron.deepspeed.merge", str(directory), str(output)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{len(whole)} tensors written to {output}\n"
    assert "Warning" not in run.stderr

    from safetensors.torch import load_file

    model = deepspeed_runs.build("llama")
    model.load_state_dict(load_file(output), strict=True)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), whole[name], err_msg=name)


@pytest.mark.full("checkpoints")
def test_tied_weights_and_prefixes(pool, tmp_path):
    """A tied weight keeps both names and is written once; a model inside a module loses its prefix."""
    run = Run(helix=ON_4, model="wrapped tied llama", steps=1)
    pool.run(
        deepspeed_runs.train_and_save,
        run,
        str(tmp_path / "saved"),
        1,
        world_size=4,
        timeout=TIMEOUT,
    )
    whole = merge_checkpoint(tmp_path / "saved", prefix="inner.")
    assert whole["lm_head.weight"] is whole["model.embed_tokens.weight"]
    assert whole["lm_head.weight"].shape == (deepspeed_runs.VOCABULARY, 32)
    model = deepspeed_runs.build("tied llama")
    model.load_state_dict(whole, strict=True)
    with pytest.raises(HelixError, match=r"no weight whose name begins with 'outer\.'"):
        merge_checkpoint(tmp_path / "saved", prefix="outer.")


def test_code_in_a_checkpoint_does_not_run(saved, tmp_path):
    """A checkpoint from elsewhere is data: what its pickles ask for runs only where the user trusts them."""
    shutil.copytree(saved[0], tmp_path / "hostile")
    marker = tmp_path / "marker"
    file = tmp_path / "hostile" / "global_step2" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    torch.save(state | {"ds_version": PAYLOADS["os.system"](str(marker))}, file)
    with pytest.raises(HelixError, match=r"mp_rank_00_model_states\.pt is refused.*trust_check"):
        merge_checkpoint(tmp_path / "hostile")
    assert not marker.exists()
    command = [sys.executable, "-m", "helix_megatron.deepspeed.merge", "--trust-checkpoint"]
    paths = str(tmp_path / "hostile"), str(tmp_path / "model.safetensors")
    subprocess.run([*command, *paths], check=True)
    assert marker.exists()


# -------------------------------------------------------------------------- refusals


def error_on(pool, run: Run, directory: Path) -> str:
    texts = pool.run(
        deepspeed_runs.error_of_loading, run, str(directory), world_size=4, timeout=TIMEOUT
    )
    assert len(set(texts)) == 1, "ranks disagree"
    return texts[0]


def test_another_layout_of_the_same_shapes_is_refused(pool, saved):
    """m = 2 by n = 1 and m = 1 by n = 2 hold parts of the same shapes: nothing else would notice."""
    directory, _, _ = saved
    by_heads = {"intra_head_parallel_size": 1, "tensor_parallel_size": 2}
    text = error_on(pool, RUN.with_(helix=by_heads), directory)
    assert "was saved with head_groups 1, and this model has 2: its parts are others." in text
    assert "python -m helix_megatron.deepspeed.merge" in text


def test_what_does_not_say_how_it_is_cut_is_refused(pool, saved, tmp_path):
    """As of a checkpoint of plain DeepSpeed."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "global_step2" / FILE).unlink()
    text = error_on(pool, RUN, tmp_path)
    assert f"global_step2 has no {FILE}: it was not saved by an engine with a helix block" in text
    with pytest.raises(HelixError, match=f"has no {FILE}"):
        merge_checkpoint(tmp_path)


def test_wrong_checkpoints_are_named(saved, tmp_path):
    """Each message says what there is instead."""
    directory, _, _ = saved
    with pytest.raises(
        HelixError, match=r"holds no checkpoint 'step9'. Valid tags: global_step2\."
    ):
        merge_checkpoint(directory, "step9")
    with pytest.raises(HelixError, match="Give the directory that was passed to"):
        merge_checkpoint(tmp_path)
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    checkpoint = tmp_path / "global_step2"
    (checkpoint / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(HelixError, match=r"lacks mp_rank_01_model_states\.pt"):
        merge_checkpoint(tmp_path)
    (checkpoint / "mp_rank_00_model_states.pt").rename(
        checkpoint / "layer_0_expert_0_mp_rank_00_model_states.pt"
    )
    with pytest.raises(HelixError, match="experts of DeepSpeed's own MoE layer"):
        merge_checkpoint(tmp_path)
    (checkpoint / FILE).write_text((checkpoint / FILE).read_text()[:50])
    with pytest.raises(HelixError, match=r"helix_parts\.json is damaged"):
        merge_checkpoint(tmp_path)


def test_zero_3_has_no_weights_to_merge(tmp_path, saved):
    """Its model files hold names only; the message says what to do."""
    checkpoint = tmp_path / "global_step2"
    checkpoint.mkdir()
    shutil.copy(saved[0] / "global_step2" / FILE, checkpoint)
    (checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(HelixError, match="was saved with ZeRO 3"):
        merge_checkpoint(tmp_path, "global_step2")


def test_the_command_exits_with_2_and_one_paragraph(tmp_path):
    """Wrong input is no traceback."""
    command = [sys.executable, "-m", "helix_megatron.deepspeed.merge", str(tmp_path), "x"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("python -m helix_megatron.deepspeed.merge: error:")
    assert "Traceback" not in run.stderr


def test_saving_one_ranks_part_as_the_model_is_refused(pool):
    """DeepSpeed's save_16bit_model would write rank 0's part of every weight."""
    texts = pool.run(deepspeed_runs.error_of_16bit_model, RUN, world_size=2, timeout=TIMEOUT)
    assert all("would write one rank's part of every weight" in text for text in texts)


def _changed(*path: Any, to: Any) -> Any:
    """A change of a manifest."""

    def change(manifest: Any) -> None:
        for step in path[:-1]:
            manifest = manifest[step]
        manifest[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_changed("host", to=["Hugging Face"]), "host is missing or of the wrong type"),
        (_changed("block", "tensor_parallel_size", to=10**9), "tensor_parallel_size is 1000000000"),
        (_changed("cuts", 0, "dim", to="0"), "cut 0 does not deal every position"),
        (
            _changed("cuts", 0, "runs", to=[[[0, 4]], [[5, 3]]]),
            "cut 0 does not deal every position",
        ),
        (_changed("cuts", 0, "runs", 0, 0, to=[0, 4, 1]), "cut 0 does not deal every position"),
        (_changed("parameters", "w", to=1), "w has the cut 1 of 1"),
        (_changed("format", to=[1]), r"has format \[1\]. Valid: 1."),
        (
            _changed("cuts", 0, "runs", to=[[[0, 10**12]], [[10**12, 4]]]),
            r"the parts of w of .* have the shapes \(4, 2\), \(4, 2\), and .* deals 1000000000000, 4 pos",
        ),
    ],
)
def test_manifests_of_strangers(tmp_path, change, said):
    """Numbers that lead to another place, or to any amount of memory, are found before they are used."""
    runs = [[[0, 4]], [[4, 4]]]
    manifest = {
        "format": 1,
        "host": "Hugging Face",
        "layout": {},
        "block": {"tensor_parallel_size": 2},
        "cuts": [{"dim": 0, "runs": runs}],
        "parameters": {"w": 0},
    }
    for rank in range(2):
        state = {"w": torch.full((4, 2), float(rank))}
        torch.save({"module": state}, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
    (tmp_path / FILE).write_text(json.dumps(manifest))
    assert merge_checkpoint(tmp_path)["w"][:, 0].tolist() == [0.0] * 4 + [1.0] * 4
    change(manifest)
    (tmp_path / FILE).write_text(json.dumps(manifest))
    with pytest.raises(HelixError, match=said):
        merge_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [FILE, "latest"])
def test_a_pipe_in_a_checkpoint(tmp_path, name):
    """It would wait for a writer."""
    (tmp_path / "step").mkdir()
    os.mkfifo(tmp_path / "step" / name)
    with pytest.raises(HelixError, match=rf"{name} is no file"):
        merge_checkpoint(*((tmp_path, "step") if name == FILE else (tmp_path / "step",)))


# ------------------------------------------------------------------ megatron-core

SIZES = (2, 1, 1, 2, 2)  # tensor, pipeline, expert, expert tensor parallel, segments


def through_an_engine(flags: dict[str, Any], source: str, target: str) -> None:
    """Load converted files into the engine of a megatron-core model, and save."""
    deepspeed_runs.start()
    from helix_megatron.deepspeed import initialize

    model = build(flags, SIZES, "auto", 4)
    config = {"train_batch_size": 4, "helix": {"intra_head_parallel_size": 2}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = initialize(model=model, optimizer=optimizer, config=config)[0]
    path, _ = engine.load_checkpoint(source, load_module_only=True)
    assert path is not None
    engine.save_checkpoint(target, tag="trained")


def test_megatron_weights_pass_through_an_engine(pool, tmp_path):
    """From the converter's rank files into an engine, and from its checkpoint back, bit for bit."""
    flags = flags_of("gqa")
    layout = RankLayout(flags, 2, helix=HelixConfig(2))
    whole = whole_model(flags)
    folder = tmp_path / "converted" / "global_step0"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text(folder.name)
    with StageFiles(folder, layout, 0, dict.fromkeys(whole, torch.float32)) as files:
        for tensor in files.tensors:
            files.write(tensor, whole[tensor.name])
    facts = {"tp": 2, "m": 2, "query_layout": layout.heads.query_layout}
    manifest = {"kind": "ranks", "layout": facts}
    (folder.parent / CONVERTED).write_text(json.dumps(manifest))

    paths = str(folder.parent), str(tmp_path / "saved")
    pool.run(through_an_engine, flags, *paths, world_size=4, timeout=TIMEOUT)
    reader = RankReader(tmp_path / "saved", layout, trust=True)
    assert reader.names == list(whole)
    for name, value in whole.items():
        assert reader.read(name).equal(value), name
    with pytest.raises(
        HelixError, match=r"of a megatron-core model.*scripts/convert_checkpoint\.py"
    ):
        merge_checkpoint(tmp_path / "saved")

    manifest["layout"]["m"] = 1
    (folder.parent / CONVERTED).write_text(json.dumps(manifest))
    with pytest.raises(
        RankError, match=r"was converted for m 1, and this model has 2\. Convert it again"
    ):
        pool.run(through_an_engine, flags, *paths, world_size=4, timeout=TIMEOUT)
