"""`helix plan` and `helix simulate` as a user runs them: what they print and write, and that it agrees."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from refusals import refusal

from helix_megatron.plan import perfetto
from helix_megatron.plan.clusters import CLUSTERS
from helix_megatron.plan.command import plan_main, simulate_main
from helix_megatron.plan.deployment import checks, partition_of
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.models import model_of
from helix_megatron.plan.results import Limits, Plan
from helix_megatron.plan.search import search
from helix_megatron.plan.settings import Job, Software
from helix_megatron.run.config import RunConfig
from helix_megatron.training.arguments import parse_args

SIZES = "--hidden-size 1024 --num-attention-heads 8 --group-query-attention"
SMALL = f"{SIZES} --num-layers 8 --num-query-groups 2 --vocab-size 32000".split()
DECODE = (
    f"{SIZES} --num-layers 1 --num-query-groups 1 --kv-channels 128 --task decode --gpus 2 --global-batch 64 "
    "--tensor-model-parallel-size 2 --micro-batch 64 --sequence-length 8192"
)
PAPER = "--model paper-dense --gpus 16 --task prefill --sequence-length 10000"
WHOLE = "--pipeline-model-parallel-size 1 --context-parallel-size 1"
CUT = "--tensor-model-parallel-size 16 --intra-head-parallel-size"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Everything that one call of `helix plan` writes, and what it prints."""
    folder, text = tmp_path_factory.mktemp("plan"), StringIO()
    words = (
        "--gpus 16 --cluster nvlink-16 --global-batch 32 --explain 1 --tensor-model-parallel-size 8 --rejected "
        f"--intra-head-parallel-size 4 --json {folder}/plan.json --plot {folder}/plan.svg --write "
        f"{folder}/deployment"
    )
    with redirect_stdout(text):
        assert plan_main([*SMALL, *words.split()]) == 0
    return folder, text.getvalue()


def test_the_table_names_all_that_was_asked_for(written):
    """Layouts, rivals, reasons, the arithmetic of a row, the verdict and the command, labelled as simulated."""
    _, text = written
    for expected in (
        "Layouts of megatron-flags by s per step (simulated)",
        "TP 8 = m 4 × n 2",
        "m = 1",
        "rejected, ",
        "Helix does not help here",
        "All figures are simulated; bytes and FLOPs of one rank.",
        "linear_qkv",
        "gradients    fp32",
        "Communication of one rank",
        "torchrun --nproc-per-node 16 scripts/pretrain_gpt.py",
        "--intra-head-parallel-size 4",
        "DeepSpeed: ",
    ):
        assert expected in text, expected


def test_json_and_plot_are_written(written):
    """Rows in the order of the table, with memory and communication; a picture with text."""
    folder, _ = written
    content = json.loads((folder / "plan.json").read_text())
    assert content["simulated"] is True
    first = content["shown"]["1"]
    assert first["simulated"] is True
    parts = {"weights", "gradients", "optimizer", "activations", "cache", "framework", "total"}
    assert set(first["memory_bytes"]) == parts
    assert {"axis", "kind", "link", "bytes", "seconds", "exposed"} == set(first["communication"][0])
    assert "simulated" in (folder / "plan.svg").read_text()


def test_the_deployment_plan_covers_everything_once(written):
    """Partitions, ranks, heads and dimensions, groups and operators: nothing missing, nothing twice."""
    folder, _ = written
    content = json.loads((folder / "deployment" / "plan.json").read_text())
    layout = content["prediction"]["layout"]
    assert [r["rank"] for r in content["ranks"]] == list(range(16))
    assert len({(r["node"], r["device"]) for r in content["ranks"]}) == 16
    replica = [r for r in content["ranks"] if not r["data_parallel_rank"] + r["pipeline_stage"]]
    for name, heads, width in (("query", 8, 128), ("key_value", 2, 128)):
        held = [
            (head, dim)
            for r in replica
            for head in r[f"{name}_heads"]
            for low, high in r[f"{name}_dimensions"]
            for dim in range(low, high)
        ]
        assert sorted(held) == [(h, d) for h in range(heads) for d in range(width)], name
    for group in content["groups"]:
        members = [rank for ranks in group["groups"] for rank in ranks]
        assert sorted(members) == list(range(16)), group["axis"]
    assert [(c["m"], c["n"]) for c in content["cuts"]] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert [c["m"] for c in content["cuts"] if c["chosen"]] == [layout["segments"]] == [4]
    steps = content["operators_per_micro_batch"][0]["steps"]
    qkv = next(s for s in steps if (s["name"], s["phase"]) == ("linear_qkv", "forward"))
    tokens = layout["micro_batch"] * 4096
    assert qkv["flops"] == 2 * tokens * 1024 * (8 + 2 * 2) * 128 / 8
    assert content["weights_of_a_rank"][0]["shape"] == [(8 + 2 * 2) * 128 // 8, 1024]
    assert all(check["passed"] for check in content["checks"])


def test_the_deployment_plan_reads_as_one_document(written):
    """What the paper's deployment plan had, and what it should have had."""
    folder, _ = written
    text = (folder / "deployment" / "plan.md").read_text()
    for heading in (
        "# Deployment of megatron-flags on 16 GPUs",
        "## Prediction (simulated)",
        "## Ways to cut TP 8: m segments × n head groups (simulated)",
        "## Where everything is: partition → rank → node and GPU",
        "## Weights of one rank",
        "## Operators of one rank, one micro-batch",
        "## Memory of the fullest GPU (simulated)",
        "## Communication of one rank in a step",
        "## Checks",
        "## Commands",
        "## What to watch",
    ):
        assert heading in text, heading
    assert "**Every figure of time and memory here is simulated, none is measured.**" in text
    assert "| (1, 3) | 7 | 0 : 7 |" in text


def test_the_papers_plan_has_the_corrected_figures(tmp_path, capsys):
    """16 heads of 512 on 16 GPUs, 4 × 4, micro-batch 1: 2·10⁴·8192·3·512 for QKV; half of 10⁴·10⁴ pairs; 7.9
    GFLOP a token, 7.1 of them in the layers; and the whole batch's activations, too large for one GPU."""
    flags = f"{PAPER} --global-batch 512 --micro-batch 1 {CUT} 4 --write {tmp_path}"
    assert plan_main(flags.split()) == 0
    content = json.loads((tmp_path / "plan.json").read_text())
    steps = {s["name"]: s for s in content["operators_per_micro_batch"][0]["steps"]}
    assert steps["linear_qkv"]["flops"] == 2 * 10000 * 8192 * 3 * 512
    assert steps["core attention"]["flops"] == pytest.approx(4 * 512 * 10000**2 / 2, rel=1e-3)
    assert {s["phase"] for s in content["operators_per_micro_batch"][0]["steps"]} == {"forward"}
    assert content["batch"]["activation_bytes_of_the_global_batch"] == 512 * 10000 * 8192 * 2
    head = 2 * 8192 * 51200
    text = (tmp_path / "plan.md").read_text()
    assert f"({(7.105e9 + head) / 1e9:.2f} GFLOP of the model a token)" in text
    capsys.readouterr()


def test_commands_to_paste_are_understood(capsys):
    """The training script's own parser and checks take every row's flags, dense and with experts."""
    for model in ("llama-3-8b", "mixtral-8x7b", "gemma-head-512", "paper-moe", "qwen3-8b"):
        flags = f"--model {model} --gpus 64 --json - --rows 4 --max-tensor-parallel 16"
        assert plan_main(flags.split()) == 0
        content = json.loads(capsys.readouterr().out)
        rows = [*content["shown"].values(), *content["rivals"].values()]
        for row in rows:
            RunConfig.from_values(parse_args(row["megatron_flags"]), 64)


def printed_commands(text: str) -> dict[str, list[str]]:
    """Program → the words after it, of the commands that the planner prints for people to paste."""
    programs = {
        "scripts/pretrain_gpt.py": "train",
        "helix serve": "serve",
        "-m helix_megatron.cli serve": "serve",
    }
    found = {}
    for line in text.replace("\\\n", " ").splitlines():
        for program, name in programs.items():
            _, here, rest = line.partition(program + " ")
            if here and rest.lstrip().startswith("--"):
                found[name] = shlex.split(rest)
    return found


@pytest.mark.parametrize("task", ["train", "prefill", "decode"])
@pytest.mark.parametrize("model", ["llama-3-8b", "mixtral-8x7b", "gpt3-5b"])
def test_every_printed_command_parses(tmp_path, capsys, task, model):
    """On the terminal and in the deployment plan: the program that a command names takes all of its flags."""
    from helix_megatron.deepspeed.config import KEY, HelixBlock
    from helix_megatron.serving.command import build_parser

    flags = f"--model {model} --gpus 16 --cluster nvlink-16 --task {task} {WHOLE} --sequence-length 2048 "
    flags += f"--global-batch 16 --write {tmp_path} " + (f"{CUT} 2" if model != "gpt3-5b" else "")
    assert plan_main(flags.split()) == 0
    page = (tmp_path / "plan.md").read_text()
    for text in (capsys.readouterr().out, page):
        commands = printed_commands(text)
        assert [*commands] == ["train" if task == "train" else "serve"]
        if task == "train":
            RunConfig.from_values(parse_args(commands["train"]), 16)
            continue
        options = build_parser().parse_args(commands["serve"])
        assert (options.dtype, options.max_sequences > 0) == ("bf16", True)
        if model == "llama-3-8b":
            assert (options.nproc_per_node, options.intra_head_parallel_size) == (16, 2)
            row = json.loads((tmp_path / "plan.json").read_text())["prediction"]["layout"]
            assert options.cache_layout == (row["cache"] if task == "decode" else "auto")
    for advice in re.findall(r"`(--[^`]+)`", page):
        parse_args([*commands.get("train", []), *shlex.split(advice)])
    block = json.loads((tmp_path / "plan.json").read_text())["prediction"]["deepspeed"]
    if block is not None:
        HelixBlock.from_dict(block[KEY])


# Flags of programs that are not ours: torchrun, nvidia-smi, and Megatron-LM's own script for fp8.
OTHERS = (
    "nproc-per-node nnodes rdzv-backend rdzv-endpoint query-gpu format fp8-format fp8-param-gather"
)
OTHERS += (
    " account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split"  # Megatron-LM's
)


def test_every_flag_that_the_planner_names_exists():
    """Advice and errors: some program that they speak of must have the flag. Commands are parsed above."""
    from helix_megatron.plan.command import build_parser
    from helix_megatron.serving import command as serve
    from helix_megatron.training import arguments as training

    known = {f"--{name}" for name in OTHERS.split()}
    for parser in (build_parser("plan", ""), training.build_parser(), serve.build_parser()):
        known |= set(parser._option_string_actions)
    sources = sorted((Path(__file__).parents[2] / "helix_megatron" / "plan").glob("*.py"))
    text = "\n".join(path.read_text() for path in sources)
    known |= set(re.findall(r'(?:add|add_argument)\(\s*"(--[a-z-]+)"', text))  # of the two commands
    named = set(re.findall(r"--[a-z][a-z0-9-]+", text))
    assert len(named) > 40
    assert named <= known, sorted(named - known)


def test_what_no_server_runs_is_no_command(capsys):
    """A pipeline for decode is a forecast, and the text says why instead of naming a program."""
    flags = "--model llama-3-8b --gpus 16 --task decode --global-batch 16 --pipeline-model-parallel-size 2"
    assert plan_main(shlex.split(flags)) == 0
    text = capsys.readouterr().out
    assert "# This row is a forecast. helix serve does not run it: it has no pipeline" in text
    assert printed_commands(text) == {}


@pytest.mark.parametrize("model", ["llama-3-8b", "mixtral-8x7b", "gpt3-5b"])
def test_context_parallelism_is_the_training_scripts(capsys, model):
    """A row with context parallelism is a command for the script here, whose checks take it."""
    from helix_megatron.run.config import RunConfig
    from helix_megatron.training.arguments import parse_args

    flags = f"--model {model} --gpus 16 --context-parallel-size 2 --rows 1 --sequence-length 2048"
    assert plan_main(flags.split()) == 0
    words = printed_commands(capsys.readouterr().out)["train"]
    run = RunConfig.from_values(parse_args(words), 16)
    assert run.sizes["cp"] == 2


def test_a_precision_that_is_asked_for_is_not_replaced(capsys):
    """fp8 where there is none is an error, not another precision."""
    flags = [*SMALL, "--gpus", "8", "--cluster", "dgx-a100", "--precision", "fp8"]
    assert "chip a100 has no fp8" in refusal(capsys, plan_main, flags)


def test_fp32_is_chosen_only_where_nothing_is_asked_for(old_chip, capsys):
    """A chip with fp32 alone is planned in fp32; bf16 there is refused."""
    flags = [*SMALL, "--gpus", "8", "--cluster", str(old_chip)]
    assert plan_main(flags) == 0
    assert ", fp32." in " ".join(capsys.readouterr().out.split())
    error = refusal(capsys, plan_main, [*flags, "--precision", "bf16"])
    assert "chip custom has no bf16" in error


def _simulated(task: str, pp: int, batch: int):
    """A plan of one layout, with its prediction."""
    limits = Limits(tp=2, pp=pp, micro_batch=1, vp=1)
    job = Job(task, 4096, batch)
    plan = search(model_of("gemma-head-512"), 8, CLUSTERS["dgx-h100"], job, Software(), limits)
    return plan, plan.predict(plan.rows[0].layout)


@pytest.mark.parametrize(("task", "batch"), [("train", 64), ("prefill", 16), ("decode", 1)])
def test_events_take_as_long_as_the_prediction(task, batch):
    """The timeline is made of the terms that are printed beside it: heads of 512 are fused in prefill only."""
    plan, p = _simulated(task, 4, batch)
    names = ("layers", "embedding", "recomputation", "output", "pipeline", "waiting")
    expected = sum(s for name, s in p.terms.items() if name.startswith(names))
    assert perfetto.timeline(plan, p.layout).seconds == pytest.approx(expected, rel=0.04)


def test_a_timeline_that_is_cut_says_so(monkeypatch):
    """Seconds of the first micro-batches beside those of the step would contradict each other."""
    plan, p = _simulated("train", 4, 64)
    assert ", 64 micro-batches: " in perfetto.pipeline_text(plan, p.layout)
    monkeypatch.setattr(perfetto, "MOST_SLOTS", 64)
    text = perfetto.pipeline_text(plan, p.layout)
    assert ", first 8 of 64 micro-batches: " in text
    assert perfetto.trace_json(plan, p.layout)["otherData"]["micro_batches_shown"] == 8


@pytest.mark.parametrize("tp", [4, 16])
def test_the_rows_of_whole_heads_are_counted(tp):
    """Every row of linear_qkv on one rank, also where stock Megatron cuts key-value heads apart."""
    model, layout = model_of("llama-3-8b"), Layout(tp=tp)
    plan = Plan(model, CLUSTERS["nvlink-16"], Job("train", 4096, 1), Software(), tp)
    found = {c["check"]: c for c in checks(plan, plan.predict(layout), partition_of(plan, layout))}
    row = found["every row of linear_qkv is on exactly one TP rank"]
    assert (row["passed"], row["figure"]) == (True, "6144 of 6144 rows")


@pytest.mark.parametrize("cache", ["batch", "sequence"])
def test_decode_on_two_ranks_takes_75_microseconds(capsys, cache):
    """H100, batch 64, 8192 positions, 8 query heads, 1 key-value head of 128, m = 2. Measured tables: 101 us
    with a replicated cache, 141 us with a score all-reduce."""
    text = {}
    for m, flags in ((2, ["--cache", cache]), (1, [])):
        cut = ["--intra-head-parallel-size", str(m), *flags]
        assert simulate_main([*DECODE.split(), *cut]) == 0
        found = re.search(
            r"\nAttention of a layer.* (\S+) us \(simulated\)\n", capsys.readouterr().out
        )
        text[m] = float(found[1])
    assert 55 < text[2] <= 75
    assert 95 < text[1] < 110


def test_a_trace_holds_the_whole_pipeline(tmp_path, capsys):
    """Chrome's format: every micro-batch of every stage, forward and backward, and its time."""
    path = tmp_path / "trace.json"
    flags = "--gpus 8 --global-batch 16 --pipeline-model-parallel-size 4 --micro-batch 1 --trace"
    assert simulate_main([*SMALL, *shlex.split(flags), str(path)]) == 0
    assert "Pipeline, event by event (simulated)" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["otherData"]["simulated"] is True
    slots = [e for e in content["traceEvents"] if e["ph"] == "X" and e["tid"] == 0]
    batches = content["otherData"]["micro_batches_of_the_step"]
    for stage in range(4):
        own = {(e["cat"], e["args"]["micro_batch"]) for e in slots if e["pid"] == stage}
        assert own == {(c, b) for c in ("forward", "backward") for b in range(batches)}
    operators = [e for e in content["traceEvents"] if e["ph"] == "X" and e["tid"] == 1]
    assert {"linear_qkv", "core attention"} <= {e["name"] for e in operators}


def test_another_kernel_can_be_asked_for(tmp_path):
    """Heads of 512, grouped: torch computes them unfused in fp32, ffpa-attn several times as fast."""
    flags = "--model gemma-head-512 --gpus 8 --sequence-length 8192 --rows 1 --tensor-model-parallel-size 4 "
    core = {}
    for kernel in ("auto", "ffpa"):
        path = tmp_path / f"{kernel}.json"
        assert plan_main(shlex.split(f"{flags} --kernel {kernel} --json {path}")) == 0
        shown = json.loads(path.read_text())["shown"]["1"]
        core[kernel] = shown["attention_seconds_per_layer"]["core"]
    assert core["auto"] > 3 * core["ffpa"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("8 --kernel ffpa", "--kernel ffpa takes no heads of"),
        ("0", "--gpus is 0. It must be a whole number of at least 1."),
        (
            "16 --tensor-model-parallel-size 3",
            "--tensor-model-parallel-size 3 does not divide --gpus 16. Valid: 1, 2, 4, 8, 16.",
        ),
        (
            "16 --micro-batch 3",
            "--micro-batch 3 does not divide --global-batch 64. Valid: 1, 2, 4, 8, 16, 32, 64; or try",
        ),
        (
            "12 --pipeline-model-parallel-size 6",
            "PP 6: 8 layers cannot be dealt to 6 stages, even with fewer on the first and the last; nearest "
            "that divide them: 4, 8",
        ),
        (
            "8 --helix-exchange gather-kv --helix-query-layout segments",
            "--helix-exchange gather-kv needs --helix-query-layout heads. Valid with segments: ",
        ),
        ("8 --plot plan.gif", "must end in .png or .svg"),
        ("8 --row 100000", "--row 100000: there are rows 1 to"),
        ("8 --frobnicate", "'--frobnicate' is no flag of helix plan"),
        ("8 --json nowhere/plan.json", "nowhere is no directory to write to"),
    ],
)
def test_impossible_wishes_are_named(capsys, flags, expected):
    """Exit 2 and one paragraph: the value, the valid values, what to try."""
    assert expected in refusal(capsys, plan_main, [*SMALL, "--gpus", *flags.split()])


def test_nothing_fits_says_what_would(capsys):
    """The seeds' batch of 1024 prompts of 10000 tokens has a cache of 1.3 TB: no 16 GPUs hold it."""
    assert plan_main([*PAPER.split(), "--global-batch", "1024"]) == 1
    assert "try --global-batch 512, or more GPUs" in " ".join(capsys.readouterr().out.split())
