"""What `helix graph` writes: JSON that comes back as it was, pictures, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import xml.etree.ElementTree as ET

import pytest
from graph_runs import BASELINE, HELIX, flags, of_rank, traced
from refusals import refusal
from waiting import run_python

from helix_megatron.checkpoint.manifest import Manifest, write_manifest
from helix_megatron.errors import HelixError
from helix_megatron.graph import command, dot
from helix_megatron.graph.build import attention_view, mlp_view
from helix_megatron.graph.dot import ranks_text, render, summary, to_dot
from helix_megatron.graph.flags import parse
from helix_megatron.graph.fold import items, tree
from helix_megatron.graph.html import to_html
from helix_megatron.graph.model import Edge, Node, Spec
from helix_megatron.graph.picture import GAP, Cell, heights

needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None, reason="graphviz (dot) is not installed"
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """The command sets what must not outlast a test."""
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


# -------------------------------------------------------------------------------- JSON


def test_json_holds_everything(tmp_path):
    """Others read the file: nothing may get lost on the way. What has its default may be left out."""
    graph = traced(HELIX)
    graph.write(tmp_path / "graph.json")
    data = json.loads((tmp_path / "graph.json").read_text())
    assert (data["format"], data["version"]) == ("helix-graph", 1)
    assert data["edges"] == [[e.source, e.output, e.target, e.input] for e in graph.edges]
    for name in ("nodes", "collectives", "weights"):
        for made, entry in zip(getattr(graph, name), data[name], strict=True):
            for field in dataclasses.fields(made):
                value = getattr(made, field.name)
                if field.name not in entry:
                    assert value == field.default or not value
                elif isinstance(value, tuple):
                    plain = [str(item) if isinstance(item, Spec) else item for item in value]
                    assert entry[field.name] == json.loads(json.dumps(plain))
                else:
                    assert entry[field.name] == (str(value) if isinstance(value, Spec) else value)
    totals = {"traced_peak", "parameters", "gradients", "activations", "flops"}
    assert totals <= data["ranks"][0].keys()
    assert data["ranks"][3]["head_group"] == 1 and data["ranks"][3]["segment"] == 1
    product = next(n for n in data["nodes"] if n["op"] == "aten.mm")
    assert product["outputs"] == [str(Spec((32, 48), "bf16"))] == ["bf16[32, 48]"]
    assert Spec((2, 3), "bf16").nbytes == 12


# ----------------------------------------------------------------------- folding, layout


def test_a_module_is_cut_where_a_collective_lies():
    """Collectives are seen even where modules are closed, and order is kept."""
    nodes = [
        Node(f"r0.{i}", kind, op, module, (0,), outputs=(Spec((1,), "f32"),))
        for i, (kind, op, module) in enumerate(
            [
                ("parameter", "weight", "decoder.layers.0.mlp.linear_fc1"),
                ("operator", "aten.mm", "decoder.layers.0.mlp.linear_fc1"),
                ("operator", "aten.gelu", "decoder.layers.0.mlp"),
                ("collective", "all-reduce", "decoder.layers.0.mlp.linear_fc2"),
                ("operator", "aten.add", "decoder.layers.0.mlp.linear_fc2"),
                ("operator", "aten.add", "decoder.layers.0"),
            ]
        )
    ]
    found = items(tree(nodes), nodes, lambda block, depth: depth <= 2)
    assert [(item.label, item.places) for item in found] == [
        ("/forward/layer 0/mlp", [1, 2]),
        ("all-reduce", [3]),
        ("/forward/layer 0/mlp", [4]),
        ("/forward/layer 0", [5]),
    ]
    apart = items(tree(nodes), nodes, lambda block, depth: True, apart=True)
    assert [item.places for item in apart] == [[1], [2], [3], [4], [5]]


def test_collectives_lie_at_one_height():
    """A collective starts when its last rank comes to it."""
    columns = [
        [Cell(10), Cell(10), Cell(5, "c")],
        [Cell(10), Cell(5, "c"), Cell(10)],
    ]
    first, second = heights(columns)
    assert first == [0, 10 + GAP, 2 * (10 + GAP)]
    assert second == [0, 2 * (10 + GAP), 2 * (10 + GAP) + 5 + GAP]


def test_columns_with_crossed_collectives_are_still_drawn():
    """Such a run would hang; its picture is what one wants to see then."""
    columns = [[Cell(1, "a"), Cell(1, "b")], [Cell(1, "b"), Cell(1, "a")]]
    assert [len(column) for column in heights(columns)] == [2, 2]


def test_ranks_as_text():
    """Ranges are short, and other sets are spelled out."""
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([4, 5, 6]) == "ranks 4-6"
    assert ranks_text([0, 2]) == "ranks 0, 2"


# ------------------------------------------------------------------------------ pictures


@needs_dot
@pytest.mark.parametrize("run", [HELIX, BASELINE], ids=["helix", "baseline"])
def test_pictures_show_every_collective_and_every_rank(tmp_path, run):
    """What the picture leaves out, nobody would miss: so it is counted."""
    graph = traced(run)
    for view, fold in ((graph, True), (attention_view(graph), False), (mlp_view(graph), False)):
        file = tmp_path / f"{view.name}.dot"
        file.write_text(to_dot(view, fold=fold))
        svg = ET.parse(render(file)).getroot()
        text = " ".join(t for t in svg.itertext() if t.strip())
        titles = {e.text for e in svg.iter("{http://www.w3.org/2000/svg}title")}
        if fold:
            assert "of equal structure" in text
        else:
            assert {one.id for one in view.collectives} <= titles
            ranks = {node.rank for node in view.nodes}
            for rank in ranks:
                assert f"rank {rank}" in text.replace("\\xa0", " ")
        assert view.name in text


@needs_dot
def test_operators_can_be_drawn_one_by_one(tmp_path):
    """`--detail operators` hides nothing: one box for each operator."""
    view = mlp_view(traced(HELIX, backward=False))
    text = to_dot(view, detail="operators", fold=True)
    boxes = [line for line in text.splitlines() if line.startswith('  "k0_')]
    program = [n for n in of_rank(view, 0) if n.kind in ("operator", "input")]
    assert len([line for line in boxes if "->" not in line]) == len(program)
    (tmp_path / "x.dot").write_text(text)
    assert render(tmp_path / "x.dot").stat().st_size > 1000


def test_without_graphviz_the_message_says_what_to_install(tmp_path, monkeypatch, capsys):
    """Pictures are an extra: data and page are written, and the user is told how to get pictures."""
    monkeypatch.setattr(dot.shutil, "which", lambda name: None)
    graph = traced(HELIX, backward=False)
    written = command.write([graph, attention_view(graph), mlp_view(graph)], tmp_path)
    assert {path.suffix for path in written} == {".json", ".dot", ".html"}
    assert "Install graphviz (apt-get install graphviz" in capsys.readouterr().err


@needs_dot
def test_a_file_that_dot_cannot_draw_is_reported(tmp_path):
    """dot's own words, not a traceback."""
    (tmp_path / "bad.dot").write_text("digraph {")
    with pytest.raises(HelixError, match="dot could not draw"):
        render(tmp_path / "bad.dot")


def test_the_page_is_self_contained():
    """It must open from a file with no network, and no text of the graph may end its script."""
    graph = traced(HELIX, backward=False)
    graph.nodes[0].op = "</script><b>"
    page = to_html([graph, attention_view(graph)])
    assert "@DATA@" not in page and "@STYLE@" not in page
    assert page.count("</script>") == 2
    for word in ("src=", "http://", "https://", "@import", "url("):
        assert word not in page.replace("http://www.w3.org/2000/svg", "")
    data = page.split('type="application/json">')[1].split("</script>")[0]
    content = json.loads(data.replace("<\\/", "</"))
    names = ["complete_helix_model", "mha_layer_0_partitioned"]
    assert [view["name"] for view in content["views"]] == names
    expected = "2 layers, dense, hidden 64, 4 heads, 2 × 16 tokens, bf16; 4 ranks"
    assert summary(graph).startswith(expected)


# --------------------------------------------------------------------------- command line


@pytest.fixture
def refused(tmp_path, capsys):
    """The error of `helix graph` with some flags, which writes nothing."""

    def refuse(*arguments: str) -> str:
        return refusal(capsys, command.main, ["--output", str(tmp_path / "out"), *arguments])

    return refuse


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--layer", "4"], "the model has layers 0 to 3"),
        (["--layer", "-1"], "--layer is -1. It must be a whole number of at least 0"),
        (["--balance", "0.5"], "--balance is 0.5. It must be a finite number of at least 1"),
        (["--balance", "nan"], "--balance is nan. It must be a finite number of at least 1"),
        (["--micro-batches", "0"], "--micro-batches is 0. It must be a whole number of at least 1"),
        (["--jobs", "0"], "--jobs is 0. It must be a whole number of at least 1"),
        (
            ["--preset", "paper-dense", "--num-experts", "8"],
            "Add --disable-bias-linear, or deal whole experts to ranks: --expert-model-parallel-size 8",
        ),
        (
            ["--preset", "paper-dense", "--tensor-model-parallel-size", "3"],
            "intra-head parallel size 4",
        ),
        (["--preset", "paper-dense", "--transformer-impl", "transformer_engine"], "need a GPU"),
    ],
)
def test_wrong_input_is_explained(refused, arguments, text):
    """Exit status 2 and one paragraph with what to try."""
    assert text in refused(*arguments)


@pytest.mark.parametrize(
    ("load", "text"),
    [
        (["--load", "{}"], "holds no complete checkpoint"),
        (["--load", "{}/none"], "does not exist. Give the directory that a run saved to"),
        (
            [],
            "--use-checkpoint-args without --load: there is nothing to load. Add --load, a directory.",
        ),
    ],
    ids=["empty", "missing", "no-load"],
)
def test_a_checkpoint_that_is_not_there_is_said(tmp_path, refused, load, text):
    """--use-checkpoint-args must not fall back to the default model without a word."""
    error = refused(*(word.format(tmp_path) for word in load), "--use-checkpoint-args")
    assert text in error and error.startswith("helix graph")
    assert not (tmp_path / "out").exists()


def test_the_model_comes_from_the_checkpoint(tmp_path):
    """--use-checkpoint-args means the same as in the training script; a flag given beside it wins."""
    model = {"num_layers": 3, "hidden_size": 96, "num_attention_heads": 6}
    write_manifest(tmp_path, Manifest("canonical", model))
    run = parse(["--load", str(tmp_path), "--use-checkpoint-args", "--num-layers", "2"], "test")
    sizes = run.model.num_layers, run.model.hidden_size, run.model.num_attention_heads
    assert sizes == (2, 96, 6)


def test_usage_errors_name_the_command(capsys):
    """The parser is the training script's; what it says must name the program that was called."""
    with pytest.raises(SystemExit):
        parse(["--num-layers", "x"], "helix graph")
    assert (
        "helix graph: error: --num-layers is 'x'. It must be a whole number"
        in capsys.readouterr().err
    )


def test_interleaved_stages_are_refused():
    """What cannot be traced is said, rather than drawn wrongly."""
    run = (
        "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    )
    with pytest.raises(HelixError, match="interleaved pipeline stages cannot be traced"):
        parse([*run.split(), "--micro-batch-size", "1", "--global-batch-size", "2"], "helix graph")


def test_layers_of_several_kinds_are_refused(refused):
    """They would be traced as attention and MLP both."""
    text = "--num-layers 2 --normalization RMSNorm --hybrid-layer-pattern=M*"
    assert "layers of several kinds are not traced" in refused(*text.split())


def test_gated_delta_nets_are_refused(refused):
    """Without the flag the graph would be of another model."""
    text = "--swiglu --normalization RMSNorm --disable-bias-linear --linear-attention-freq 2"
    error = refused(*text.split())
    assert (
        "gated delta nets are not traced" in error and "Leave out --linear-attention-freq" in error
    )


def test_soft_caps_of_scores_are_refused(refused):
    """The graph's fused attention is not what computes them."""
    error = refused("--attn-logit-softcapping", "50")
    assert "soft caps of scores are not traced" in error
    assert "Leave out --attn-logit-softcapping" in error


def test_an_output_that_cannot_be_made_is_explained(tmp_path, refused):
    """A file where the directory should be."""
    (tmp_path / "file").write_text("")
    error = refused("--output", str(tmp_path / "file" / "graph"))
    assert "cannot be made: Not a directory" in error


def test_exit_status_says_whether_checks_passed(tmp_path, monkeypatch, capsys):
    """A script must be able to rely on `--check`: 0 when all pass, 1 when one fails."""
    from helix_megatron.graph import build

    graph = traced(HELIX, backward=False)
    monkeypatch.setattr(build, "build", lambda *args, **kwargs: graph)
    arguments = ["--check", "--output", str(tmp_path), *flags(HELIX)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("passed  ") == 8 and "FAILED" not in printed
    first = graph.edges[0]
    broken = dataclasses.replace(first, source=next(n.id for n in of_rank(graph, 1) if n.outputs))
    graph.edges[0] = Edge(broken.source, 0, first.target, first.input)
    graph.__dict__.pop("producers", None)
    assert command.main([*arguments, "--overwrite"]) == 1
    assert "FAILED  every cross-rank edge is a collective" in capsys.readouterr().out


def test_help_answers_without_torch():
    """Asking for help must not take the seconds of importing torch."""
    program = (
        "import sys\n"
        "from helix_megatron.graph import command, checks, dot, fold, html, model, picture\n"
        "try:\n    command.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)\n"
    )
    run = run_python(["-c", program])
    assert run.returncode == 0, run.stderr
    assert "--backward" in run.stdout and "paper-dense" in run.stdout


def test_the_whole_command(tmp_path):
    """From flags to files, in a process of its own, with two tracing processes."""
    arguments = ["--output", str(tmp_path), "--check", "--jobs", "2", *flags(HELIX)]
    run = run_python(["-m", "helix_megatron.graph.command", *arguments])
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("passed  ") == 8
    names = ("complete_helix_model", "mha_layer_0_partitioned", "mlp_layer_0_tensor_parallel")
    kinds = ("json", "dot", "svg") if shutil.which("dot") else ("json", "dot")
    for name in names:
        for kind in kinds:
            assert (tmp_path / f"{name}.{kind}").stat().st_size > 0
    data = json.loads((tmp_path / "complete_helix_model.json").read_text())
    assert data == json.loads(json.dumps(traced(HELIX, backward=False).to_json()))
