"""`bench convert`: memory and speed of converting a model from Hugging Face files to canonical ones and back.

A random Llama of the size asked for is written as safetensors, converted there and back, each time in a
process of its own, and the files are compared with the originals. Between the conversions the same files are
plainly copied, and synced to the disk as the converter's are. The exit status is 1 if the files differ.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from helix_megatron.bench.result_file import write_json
from helix_megatron.checkpoint.command import parse_size
from helix_megatron.errors import HelixError
from helix_megatron.flags import INPUT_DIRECTORY, one_line
from helix_megatron.tables import text_table

NAME = "convert"
HELP = "memory and speed of converting Hugging Face files to canonical ones and back"
# What a process of its own runs: memory is its high-water mark, so nothing else may have run in it.
PROGRAM = """
import io, json, sys, time
from pathlib import Path
from helix_megatron.bench.timing import peak_memory
from helix_megatron.checkpoint.convert import convert
source, target, kind = sys.argv[1:]
imported = peak_memory()
began, worked = time.perf_counter(), time.process_time()
convert(source, target, kind, out=io.StringIO())
print(json.dumps([time.perf_counter() - began, time.process_time() - worked, imported, peak_memory()]))
"""
STEPS = (
    ("Hugging Face → canonical", "model", "store", "canonical"),
    ("canonical → Hugging Face", "store", "back", "huggingface"),
)


class Row(NamedTuple):
    """One conversion, or a copy; bytes and seconds. Memory of a copy is not measured.

    `cpu_seconds` of all threads tell what a machine that is busy with other things hides.
    """

    name: str
    bytes: int
    seconds: float
    cpu_seconds: float
    imported_memory: int | None = None
    peak_memory: int | None = None

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds

    @property
    def memory(self) -> int:
        """Bytes beyond what importing takes."""
        return (self.peak_memory or 0) - (self.imported_memory or 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = "of the model (default: %(default)s)"
    parser.add_argument("--size", type=one_line, default="1GB", help=size)
    where = "where to write, some four times the size (default: a temporary one)"
    parser.add_argument("--directory", type=INPUT_DIRECTORY, help=where)


def run(args: argparse.Namespace) -> int:
    """Measure and print; exit status 0 if the files came back identical."""
    size = parse_size(args.size)
    if args.directory is not None and not Path(args.directory).is_dir():
        raise HelixError(f"--directory {args.directory} is no directory. Give one that exists.")
    with tempfile.TemporaryDirectory(prefix="helix-convert-", dir=args.directory) as folder:
        root = Path(folder)
        largest = write_model(root / "model", size)
        rows = [_copied(root)]
        for name, source, target, kind in STEPS:
            rows += [_converted(name, root / source, root / target, kind), _copied(root)]
        model, back = root / "model", root / "back"
        names = sorted(path.name for path in model.iterdir())
        _, different, missing = filecmp.cmpfiles(model, back, names, shallow=False)
    identical = not different and not missing
    copy_rate, converted = statistics.median(row.rate for row in rows[::2]), rows[1::2]
    _print(rows, largest, copy_rate, identical)
    beyond = [row.memory for row in converted]
    results = {
        "rows": [row._asdict() for row in rows],
        "largest_tensor_bytes": largest,
        "median_copy_bytes_per_second": copy_rate,
        "throughput_relative_to_copy": [row.rate / copy_rate for row in converted],
        "peak_memory_beyond_imports": beyond,
        "peak_memory_beyond_imports_and_largest_tensor": [memory - largest for memory in beyond],
        "files_identical": identical,
    }
    write_json(args.json, args.argv, results)
    return 0 if identical else 1


def _print(rows: list[Row], largest: int, copy_rate: float, identical: bool) -> None:
    lines = []
    for row in rows:
        sizes = (row.peak_memory, row.memory, row.memory - largest) if row.peak_memory else ()
        memory = [f"{size / 1e6:.0f}" for size in sizes] or [""] * 3
        figures = (row.seconds, row.cpu_seconds, row.rate / 1e9, row.rate / copy_rate)
        speed = [f"{figure:.2f}" for figure in figures]
        lines.append([row.name, *speed, *memory])
    header = ["", "s", "CPU s", "GB/s", "of a copy", "peak MB", "- imports", "- largest tensor"]
    print(f"{rows[0].bytes / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB\n")
    print(text_table(header, lines))
    print(f"\nFiles that came back are {'identical' if identical else 'DIFFERENT'}.")


def write_model(folder: Path, size: int) -> int:
    """A Llama of about `size` bytes with random weights in bf16; the bytes of its largest tensor."""
    import torch

    from helix_megatron.checkpoint import huggingface_io as io
    from helix_megatron.model.families import FAMILIES

    family = FAMILIES["llama"]
    config = _config(size)
    rules = family.rules(family.model_flags(config))
    pairs = [pair for rule in rules for pair in zip(rule.sources, rule.shapes, strict=True)]
    entries = [io.Entry(name, torch.bfloat16, tuple(shape)) for name, shape in pairs]
    shape_of = dict(pairs)

    def random(name: str) -> Any:
        return torch.empty(shape_of[name], dtype=torch.int16).random_().view(torch.bfloat16)

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = io.shards(entries, 5 * 10**9)
    for name, part in files.items():
        io.write_safetensors(folder / name, part, random)
    if len(files) > 1:
        (folder / io.INDEX).write_bytes(io.make_index(files))
    return max(entry.nbytes for entry in entries)


def _config(size: int) -> dict[str, Any]:
    """Layers of a 1-billion-parameter Llama, as many as make up the size; narrower ones below 500 MB."""
    hidden, vocabulary = (2048, 32000) if size >= 5 * 10**8 else (256, 4000)
    ffn, heads, groups = 4 * hidden, hidden // 128, hidden // 256
    per_layer = 2 * hidden * (hidden + 128 * groups + 1) + 3 * hidden * ffn
    layers = max(1, round((size / 2 - 2 * vocabulary * hidden) / per_layer))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _copied(root: Path) -> Row:
    target = root / "copy"
    target.mkdir()
    began, worked = time.perf_counter(), time.process_time()
    for path in sorted((root / "model").iterdir()):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    shutil.rmtree(target)
    return Row("plain copy", _size(root / "model"), seconds, cpu_seconds)


def _converted(name: str, source: Path, target: Path, kind: str) -> Row:
    command = [sys.executable, "-c", PROGRAM, str(source), str(target), kind]
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}  # as `helix convert` sets it
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return Row(name, _size(source.parent / "model"), *json.loads(answer.stdout))
