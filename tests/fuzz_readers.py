"""Every reader of files that nobody vouches for, given mutations of valid ones.

    python tests/fuzz_readers.py --minutes 20 config index      some readers, as long as wanted
    python tests/fuzz_readers.py --cases 50                     all of them, briefly: `test_fuzz_readers.py`
    python tests/fuzz_readers.py --findings DIR config          keep the first file of each kind of fault

It exits with 1 where a reader did something else than to read a file or to say what is wrong with it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzzing import Reader, fuzz
from hypothesis import strategies as st
from mutations import (
    broken,
    mutated_index,
    mutated_json,
    mutated_lines,
    mutated_pickle,
    mutated_safetensors,
    mutated_text,
    mutated_zip,
)
from safetensors.torch import save_file
from synthetic_runs import write_three
from tiny_checkpoints import write_hugging_face

from helix_megatron.checkpoint.convert import convert
from helix_megatron.checkpoint.huggingface_io import INDEX, HuggingFaceReader
from helix_megatron.checkpoint.manifest import CHECKSUM_NAME, MANIFEST_NAME
from helix_megatron.checkpoint.packed import open_weights
from helix_megatron.checkpoint.rank_io import rank_directory
from helix_megatron.checkpoint.safe import inspect, load_common
from helix_megatron.checkpoint.sources import open_source, stock_flags
from helix_megatron.checkpoint.store import POINTER, Store
from helix_megatron.data.indexed_files import (
    add_documents,
    check_indexed_dataset,
    write_indexed_datasets,
)
from helix_megatron.deepspeed.checkpoints import FILE, converted_layout, find_checkpoint
from helix_megatron.deepspeed.merge import merge_checkpoint
from helix_megatron.errors import HelixError
from helix_megatron.huggingface.load import read_configuration
from helix_megatron.inference.tokens import FileTokens, HuggingFaceTokens, configured_stops
from helix_megatron.plan.clusters import read_cluster
from helix_megatron.plan.models import model_of
from helix_megatron.training.report_runs import compare, read_run
from helix_megatron.training.report_table import table_text

MODEL = "model"


def read_everything(folder: Path) -> None:
    """All tensors and side files of a checkpoint, as a conversion reads them."""
    source = open_source(folder / MODEL)
    for name in source.names:
        source.read(name)
    source.sidecars()
    source.finish()


# ------------------------------------------------------------------- Hugging Face


def read_config(folder: Path) -> None:
    """As a conversion, the planner, the Hugging Face host and the server read it."""
    in_turn(folder / MODEL, [open_source, lambda path: model_of(str(path)), configured_stops])


def read_cuttable_config(folder: Path) -> None:
    """The same, and as the Hugging Face host reads it, which does not cut every family."""
    in_turn(folder / MODEL, [lambda path: read_config(folder), read_configuration])


def in_turn(path: Path, readers: Sequence[Any]) -> None:
    """Every reader has its turn, also where one before refuses."""
    refusal = None
    for read in readers:
        try:
            read(path)
        except HelixError as error:
            refusal = error
    if refusal is not None:
        raise refusal


def model_with(**options: Any) -> Callable[[Path], object]:
    return lambda folder: write_hugging_face(folder / MODEL, **options)


def config_reader(model: str, read: Callable[[Path], None] = read_cuttable_config) -> Reader:
    return Reader(model_with(model=model), f"{MODEL}/config.json", mutated_json, read)


def make_packed(folder: Path) -> None:
    """A matrix in blocks of fp8, the last ones partial, and its scales."""
    (folder / MODEL).mkdir(parents=True)
    packing = {"quant_method": "fp8", "weight_block_size": [8, 4]}
    (folder / MODEL / "config.json").write_text(json.dumps({"quantization_config": packing}))
    matrix = torch.arange(120.0).view(12, 10).to(torch.float8_e4m3fn)
    tensors = {"a.weight": matrix, "a.weight_scale_inv": torch.full((2, 3), 0.1)}
    save_file(tensors, folder / MODEL / "model.safetensors")


def read_tensors(folder: Path) -> None:
    for files in (HuggingFaceReader(folder / MODEL), open_weights(folder / MODEL)):
        for name in files.names:
            files.read(name)


# ---------------------------------------------------------------------- canonical


def make_canonical(folder: Path) -> None:
    write_hugging_face(folder / "source")
    convert(folder / "source", folder / MODEL, "canonical", out=io.StringIO())


def make_store(folder: Path) -> None:
    """Two iterations, and a pointer to the second."""
    make_canonical(folder)
    root = folder / MODEL
    shutil.copytree(root / "release", root / "iter_0000010")
    (root / "release").rename(root / "iter_0000020")
    (root / POINTER).write_text("20")


def make_stock(folder: Path) -> None:
    """What stock Megatron leaves: no manifest, and the arguments in common.pt."""
    make_canonical(folder)
    release = folder / MODEL / "release"
    model = json.loads((release / MANIFEST_NAME).read_text())["model"]
    for name in (MANIFEST_NAME, CHECKSUM_NAME):
        (release / name).unlink()
    common = torch.load(release / "common.pt", weights_only=False)
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()}
    common["args"] = argparse.Namespace(**arguments, tokenizer_type="NullTokenizer")
    torch.save(common, release / "common.pt")


def read_stock(folder: Path) -> None:
    in_turn(folder / MODEL / "release", [inspect, load_common, stock_flags])
    read_everything(folder)


def agreeing(directory: str) -> Callable[[Path], None]:
    """Makes the hash beside a manifest that of the manifest, as whoever forges one would."""

    def agree(folder: Path) -> None:
        content = (folder / directory / MANIFEST_NAME).read_bytes()
        text = f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_NAME}\n"
        (folder / directory / CHECKSUM_NAME).write_text(text)

    return agree


def make_ranks(folder: Path) -> None:
    write_hugging_face(folder / "source")
    convert(folder / "source", folder / MODEL, "ranks", out=io.StringIO())


def read_ranks(folder: Path) -> None:
    directory = folder / MODEL
    in_turn(folder, [read_everything, lambda _: converted_layout(directory, directory / "x")])


def read_pointer(folder: Path) -> None:
    """All that a training run asks of a store."""
    store = Store(folder / MODEL)
    store.is_unused()
    store.latest()
    store.complete()
    store.resolve()


# ----------------------------------------------------------------------- DeepSpeed


def make_parts(folder: Path) -> None:
    """A cut model of two ranks, with a tied and a whole weight."""
    directory = folder / MODEL / "global_step2"
    directory.mkdir(parents=True)
    (folder / MODEL / "latest").write_text("global_step2")
    layout = {"head_groups": 1, "segments": 2, "query_layout": "heads"}
    manifest = {
        "format": 1,
        "host": "Hugging Face",
        "layout": layout,
        "block": {"tensor_parallel_size": 2, "mlp": True, "embeddings": True},
        "cuts": [
            {"dim": 0, "runs": [[[0, 2], [4, 2]], [[2, 2], [6, 2]]]},
            {"dim": 1, "runs": [[[0, 1]], [[1, 1]]]},
        ],
        "parameters": {"a.weight": 0, "b.weight": 1},
    }
    (directory / FILE).write_text(json.dumps(manifest))
    for rank in range(2):
        state = {"a.weight": torch.ones(4, 2), "b.weight": torch.ones(2, 1), "c": torch.ones(3)}
        torch.save({"module": state}, directory / f"mp_rank_{rank:02d}_model_states.pt")


def read_parts(folder: Path) -> None:
    merge_checkpoint(folder / MODEL)


def read_tag(folder: Path) -> None:
    in_turn(folder / MODEL, [find_checkpoint, rank_directory, merge_checkpoint])


# ---------------------------------------------------------------------------- data


def make_index(folder: Path) -> None:
    with write_indexed_datasets([str(folder / "data")], np.uint16) as builders:
        add_documents(builders[0], np.arange(60, dtype=np.uint16), [10, 0, 20, 30])


def read_index(folder: Path) -> None:
    check_indexed_dataset(str(folder / "data"), 100)


# ------------------------------------------------------------------------ planning

CLUSTER = """\
name: mine
gpus_per_domain: 8
domain_bandwidth: 450e9
network_bandwidth: 5.0e+10
gpus: 64
chip:
  name: x
  flops: {bf16: 9.0e+14, fp8: 1.8e+15}
  memory: 80.0e+9
  memory_bandwidth: 3.0e+12
  units: 132
  sustained: {bf16: 0.7}
"""


def make_cluster(folder: Path) -> None:
    (folder / "cluster.yaml").write_text(CLUSTER)


def mutated_yaml(content: bytes) -> Any:
    """As JSON, which YAML includes, and as YAML with what only that has."""
    document = yaml.safe_load(content)
    lines = [
        "a: &a [x, x]",
        "b: &b [*a, *a]",
        "? [a]",
        "<<: 1",
        "!!python/none x",
        "---",
        "\t",
        "*a",
        "- 1",
        "a: 2026-11-29",
        "a: !!binary x",
        "a: 0o7",
        "a: 1:60",
    ]
    many = "".join(
        f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9) if i else 1}]\n" for i in range(12)
    )
    put = st.lists(
        st.sampled_from([*lines, many, "[" * 5000, "{" * 5000, "- " * 5000]), min_size=1, max_size=2
    )
    around = put.map(lambda some: ("\n".join(some) + "\n").encode() + content)
    behind = put.map(lambda some: content + "\n".join(some).encode())
    edits = mutated_json(json.dumps(document).encode())
    return st.one_of(edits, edits, edits, around, behind, broken(content))


def read_and_plan(folder: Path) -> None:
    """A cluster, and what the cheapest search makes of it."""
    from helix_megatron.plan.search import search
    from helix_megatron.plan.settings import Job, Software

    cluster = read_cluster(folder / "cluster.yaml")
    search(model_of("llama-3-8b"), 1, cluster, Job("train", 128, 8), Software())


# ---------------------------------------------------------------------- tokenizers


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["a b ab abc abcd"], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder / MODEL)


def use(tokens: Any) -> None:
    """What a server does with a tokenizer."""
    ids = tokens.encode("abc d")
    stream = tokens.decoder(ids)
    stream.add(ids[:3])
    stream.finish()
    tokens.close()


def read_tokenizer_file(folder: Path) -> None:
    from helix_megatron.data.text import HuggingFaceTokenizer

    use(FileTokens(folder / MODEL / "tokenizer.json"))
    HuggingFaceTokenizer(str(folder / MODEL)).tokenize_batch([b"abc d"])


def read_tokenizer(folder: Path) -> None:
    in_turn(folder, [read_tokenizer_file, lambda _: use(HuggingFaceTokens(folder / MODEL))])


# ------------------------------------------------------------------------- results


def read_runs(folder: Path) -> None:
    table_text(compare([read_run(folder / name) for name in ("stock", "helix", "mixture")]))


READERS = {
    "config": config_reader("llama"),
    "config of experts": config_reader("mixtral"),
    "config of gpt2": config_reader("gpt2", read_config),
    "index": Reader(model_with(files=2), f"{MODEL}/{INDEX}", mutated_json, read_everything),
    "safetensors in fp8": Reader(
        make_packed, f"{MODEL}/model.safetensors", mutated_safetensors, read_tensors
    ),
    "safetensors": Reader(
        model_with(), f"{MODEL}/model.safetensors", mutated_safetensors, read_tensors
    ),
    ".metadata": Reader(make_stock, f"{MODEL}/release/.metadata", mutated_pickle, read_stock),
    "common.pt": Reader(make_stock, f"{MODEL}/release/common.pt", mutated_zip, read_stock),
    "manifest": Reader(
        make_canonical,
        f"{MODEL}/release/{MANIFEST_NAME}",
        mutated_json,
        read_everything,
        agreeing(f"{MODEL}/release"),
    ),
    "manifest of ranks": Reader(
        make_ranks,
        f"{MODEL}/{MANIFEST_NAME}",
        mutated_json,
        read_ranks,
        agreeing(MODEL),
    ),
    "idx": Reader(make_index, "data.idx", mutated_index, read_index),
    "cluster": Reader(make_cluster, "cluster.yaml", mutated_yaml, read_and_plan),
    "tokenizer": Reader(make_tokenizer, f"{MODEL}/tokenizer.json", mutated_json, read_tokenizer),
    "tokenizer config": Reader(
        make_tokenizer, f"{MODEL}/tokenizer_config.json", mutated_json, read_tokenizer
    ),
    "parts": Reader(make_parts, f"{MODEL}/global_step2/{FILE}", mutated_json, read_parts),
    "pointer": Reader(make_store, f"{MODEL}/{POINTER}", mutated_text, read_pointer),
    "latest": Reader(make_parts, f"{MODEL}/latest", mutated_text, read_tag),
    "run": Reader(write_three, "helix/run.json", mutated_json, read_runs),
    "metrics": Reader(write_three, "helix/metrics.jsonl", mutated_lines, read_runs),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--cases", type=int, default=10**9, help="files of each reader")
    parser.add_argument("--minutes", type=float, default=1e9, help="time of each reader")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument(
        "--findings", type=Path, help="directory for the first file of each kind of fault"
    )
    parser.add_argument("--verbose", action="store_true", help="tell why files were refused")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    faults = 0
    for name in options.readers or READERS:
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"cases": options.cases, "minutes": options.minutes, "start": options.seed}
            outcome = fuzz(READERS[name], Path(folder), **arguments)
        outcome.report(name, options.findings, options.verbose)
        faults += outcome.faults.total()
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
