"""Models and clusters: where they come from, and errors that say what to do."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from helix_megatron.errors import HelixError
from helix_megatron.plan.clusters import CLUSTERS, LOCAL, cluster_of
from helix_megatron.plan.launch_commands import LEFT_OUT, model_words
from helix_megatron.plan.models import model_of, model_of_arguments, spec_of_config
from helix_megatron.plan.presets import PRESETS

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
CLUSTER = """
chip: h100
gpus_per_domain: 4
domain_bandwidth: 450e9
network_bandwidth: 25.0e9
"""


def error(call, *arguments: object) -> str:
    with pytest.raises(HelixError) as found:
        call(*arguments)
    return str(found.value)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74),  # published parameter counts
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.55),
        ("llama-3-405b", 405.85),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
        ("qwen3-30b-a3b", 30.53),
        ("qwen3-235b-a22b", 235.09),
        ("mixtral-8x7b", 46.70),
        ("gpt3-175b", 174.6),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, billions):
    """Sizes typed wrongly would be found nowhere else."""
    assert model_of(name).parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_the_papers_model_has_what_the_design_says():
    """About 3.2 B in its 4 layers; 18 B with 8 experts, beside the vocabulary that no claim is about."""
    dense, experts = model_of("paper-dense"), model_of("paper-moe")
    layers = dense.parameters - dense.vocab_size * dense.hidden_size
    assert layers / 1e9 == pytest.approx(3.2, rel=0.02)
    of_experts = experts.parameters - experts.vocab_size * experts.hidden_size
    assert of_experts / 1e9 == pytest.approx(18, rel=0.03)
    assert experts.active_parameters < experts.parameters / 3


def test_every_preset_is_a_model():
    """A preset that cannot be built is a dead name in the help text."""
    for name in PRESETS:
        assert model_of(name).parameters > 1e9
        assert model_of(name.upper()).name == name


def test_config_json_gives_the_preset(tmp_path):
    """A file, and the directory that holds it, are the same model as the preset by its name."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for path in (tmp_path, tmp_path / "config.json"):
        model, preset = model_of(str(path)), model_of("llama-3-8b")
        sizes = ("parameters", "num_query_groups", "head_dim", "norm_tensors", "vocab_size")
        for field in (*sizes, "is_gated"):
            assert getattr(model, field) == getattr(preset, field), field
        for flag in ("rotary_base", "norm_epsilon"):  # no sizes, but the command is for that model
            assert model.flags[flag] == preset.flags[flag], flag


@pytest.mark.parametrize(
    ("packing", "said"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "in fp8 blocks. They are unpacked",
        ),
        ({"quant_method": "awq"}, "'awq' .* cannot be read.* Its weights are counted in bf16"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_how_files_pack_weights_is_told(packing, said, inside):
    """Of the text's part of a config.json, too; files that cannot be read are no reason not to plan."""
    config = LLAMA | {"quantization_config": packing}
    config = {"model_type": "of tomorrow", "text_config": config} if inside else config
    with pytest.warns(UserWarning, match=said):
        model = spec_of_config("packed", config, "")
    assert model.parameters == model_of("llama-3-8b").parameters


def test_megatron_flags_give_a_model():
    """In one string, or as words of the command line itself."""
    flags = (
        "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --group-query-attention "
        "--num-query-groups 8 --ffn-hidden-size 14336 --swiglu --disable-bias-linear --normalization "
        "RMSNorm --untie-embeddings-and-output-weights --vocab-size 128256"
    )
    assert model_of(flags).parameters == model_of("llama-3-8b").parameters
    assert model_of_arguments(flags.split()).parameters == model_of("llama-3-8b").parameters


@pytest.mark.parametrize("name", ["llama", "llama-3-405b", "qwen3-30b-a3b"])
def test_commands_leave_defaults_out_and_describe_the_model(name):
    """A model from a config.json has a value for every flag; few of them are written."""
    model = spec_of_config(name, LLAMA, "") if name == "llama" else model_of(name)
    words = model_words(model)
    assert not {"--mamba-head-dim", "--kv-lora-rank", "--yarn-mscale"} & set(words)
    others = {*LEFT_OUT, "seq_length"}
    described = model_of_arguments(words).to_flags()
    assert {n: v for n, v in described.items() if n not in others} == {
        n: v for n, v in model.to_flags().items() if n not in others
    }


def test_wrong_models_are_named(tmp_path):
    """Every text says what would be right."""
    assert "Did you mean llama-3-8b?" in error(model_of, "llama-3-8")
    assert "cannot read model file" in error(model_of, str(tmp_path / "none.json"))
    path = tmp_path / "config.json"
    for text, expected in (
        ("{", "no valid JSON"),
        ("[]", "no JSON object"),
        ('{"model_type": "lama"}', "Did you mean llama?"),
        (
            json.dumps(LLAMA | {"num_key_value_heads": 5}),
            "the first must be a multiple of the second",
        ),
        (json.dumps(LLAMA | {"hidden_size": "big"}), "hidden_size = 'big'"),
        (json.dumps(LLAMA | {"num_hidden_layers": 0}), "num_hidden_layers = 0"),
    ):
        path.write_text(text)
        assert expected in error(model_of, str(path)), text
    gqa = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention"
    assert "cannot share 3 key-value heads" in error(model_of, f"{gqa} --num-query-groups 3")
    assert "needs --hidden-size" in error(model_of, "--num-layers 2")
    sizes = "--hidden-size 64 --num-attention-heads"
    assert "Did you mean --num-layers?" in error(model_of, f"{sizes} 4 --num-layer 2")
    assert "model flags: argument --num-layers" in error(model_of, "--num-layers two")
    found = error(model_of, f"{sizes} 7 --num-layers 2")
    assert "does not divide into num_attention_heads 7" in found


def test_a_cluster_file_is_read(tmp_path):
    """Numbers as YAML 1.1 writes them (450e9 is text to it), and a chip of one's own."""
    path = tmp_path / "small.yaml"
    path.write_text(CLUSTER)
    cluster = cluster_of(str(path))
    assert (cluster.name, cluster.domain, cluster.domain_bandwidth) == ("small", 4, 450e9)
    chip = "{flops: {bf16: 1e15}, memory: 9e10, memory_bandwidth: 4e12, units: 100}"
    path.write_text(CLUSTER.replace("h100", chip))
    chip = cluster_of(str(path)).chip
    assert (chip.flops["bf16"], chip.memory, chip.units) == (1e15, 9e10, 100)
    assert 0 < chip.sustained["bf16"] <= 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("gpus_per_domain", "gpus_per_node"), "Did you mean gpus_per_domain?"),
        (("chip: h100", "chip: h101"), "Did you mean h100?"),
        (("network_bandwidth: 25.0e9", ""), "network_bandwidth is missing"),
        (("450e9", "-1"), "domain_bandwidth is -1"),
        (("450e9", "fast"), "is 'fast'. It must be a finite number of at least 1000.0"),
        (("gpus_per_domain: 4", "gpus_per_domain: 0"), "gpus_per_domain is 0"),
        (("gpus_per_domain: 4", "gpus_per_domain: four"), "gpus_per_domain is 'four'"),
        (("chip: h100", "chip: {flops: 3}"), "chip.memory is missing"),
        (("chip: h100", "chip: ["), "is not YAML"),
    ],
)
def test_wrong_cluster_files_are_named(tmp_path, change, expected):
    """Strict keys: a slip must not become a default."""
    path = tmp_path / "c.yaml"
    path.write_text(CLUSTER.replace(*change))
    assert expected in error(cluster_of, str(path))


def test_wrong_clusters_are_named(tmp_path):
    """As for models."""
    assert "Did you mean dgx-h100?" in error(cluster_of, "dgx-h10")
    assert "is missing. A cluster file holds chip" in error(cluster_of, str(tmp_path / "no.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    assert "must be a mapping" in error(cluster_of, str(tmp_path / "list.yaml"))


def test_cluster_files_of_strangers(tmp_path):
    """No traceback, no endless reading, no value that multiplies when it is shown."""
    path = tmp_path / "c.yaml"
    os.mkfifo(path)
    assert "c.yaml is no file" in error(cluster_of, str(path))
    path.unlink()
    many = "".join(
        f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9) if i else 1}]\n" for i in range(30)
    )
    for text, expected in (
        (CLUSTER + many + "gpus: *k29", "has aliases"),
        ("[" * 10_000, "has more than 4 levels"),
        ("[" * 3, "is not YAML"),
        ("- " * 5000, "has more than 4 levels"),
        (CLUSTER + "gpus: 2026-13-40", "gpus is '2026-13-40'. It must be a whole number"),
        (CLUSTER + "gpus: " + "9" * 5000, "gpus is '999"),
        ("x" * 10**6, "has 1,000,000 bytes, and 65,536 are the most"),
        (CLUSTER + "\ngpus: " + "x" * 10_000, "gpus is 'xxx"),
    ):
        path.write_text(text)
        assert expected in error(cluster_of, str(path))
        assert len(error(cluster_of, str(path))) < 1000


def test_this_machine_is_a_cluster(monkeypatch):
    """Without a GPU its cores are ranks; with one, nvidia-smi names it."""
    from helix_megatron.plan import clusters

    monkeypatch.setattr(clusters, "_nvidia_smi", list)
    assert cluster_of(LOCAL).chip.name == "cpu"

    def printed(*lines: str) -> None:
        run = subprocess.CompletedProcess([], 0, stdout="\n".join(lines) + "\n")
        monkeypatch.setattr(clusters.subprocess, "run", lambda *_, **__: run)

    monkeypatch.undo()
    for line, chip, link in (
        ("NVIDIA H100 80GB HBM3, 81559", "h100", "NVLink 4"),
        ("NVIDIA H100 PCIe, 81559", "h100-pcie", "PCIe 5 x16"),
        ("NVIDIA A100-SXM4-80GB, 81920", "a100", "NVLink 3"),
        ("NVIDIA A100-PCIE-40GB, 40960", "a100", "PCIe 4 x16"),
        ("NVIDIA GB200, 189471", "gb200", "NVLink 5"),
    ):
        printed(*[line] * 4)
        found = cluster_of(LOCAL)
        assert (found.chip.name, found.domain_link, found.domain, found.gpus) == (chip, link, 4, 4)
        assert found.chip.memory == int(line.split(", ")[1]) * 2**20
    for lines, expected in (
        (["Tesla T4, 15360"], "has 'Tesla T4', which is unknown. Known: a100, a100-pcie, h100"),
        (["NVIDIA RTX A1000, 8188"], "has 'NVIDIA RTX A1000', which is unknown"),
        (["NVIDIA H200, [N/A]"], "gives '[N/A]' as the memory of 'NVIDIA H200', not MiB"),
        (["NVIDIA H200, 1", "Tesla T4, 1"], "GPUs of several kinds, NVIDIA H200, Tesla T4"),
    ):
        printed(*lines)
        assert expected in error(cluster_of, LOCAL)


def test_every_preset_says_where_it_comes_from():
    """A constant without a source is a guess."""
    assert all(cluster.source and cluster.chip.source for cluster in CLUSTERS.values())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("gpus_per_domain: 4", "gpus_per_domain: 0.5"),
            "gpus_per_domain is '0.5'. It must be a whole number",
        ),
        (
            ("450e9", "1e308"),
            "domain_bandwidth is 1e+308. It must be a finite number of at least 1000.0",
        ),
        (("450e9", "0.5"), "domain_bandwidth is 0.5. It must be a finite number"),
        (("450e9", "9" * 5000), "domain_bandwidth is inf. It must be a finite number"),
        (("450e9", "[1, 2]"), "domain_bandwidth is a list or a mapping."),
        (
            (
                "chip: h100",
                "chip: {flops: {bf16: 1e12}, memory: 80e9, memory_bandwidth: 1e12, units: 0.5}",
            ),
            "units",
        ),
        (("chip: h100", "chip: &a h100\nname: *a"), "has aliases"),
        (("chip: h100", f"chip: {'[' * 20000}"), "has more than 4 levels"),
        (("chip: h100", "chip: 2024-99-99"), "chip '2024-99-99' is unknown"),
        (("chip: h100", '"na\\u0000me": x'), "unknown entry"),
        (("25.0e9", "25.0e9\nname: ''"), "name is ''. It must be a text of one line"),
    ],
)
def test_hostile_cluster_files_are_named(tmp_path, change, expected):
    """Numbers out of every range, aliases that multiply, deep nesting: a sentence, at once."""
    path = tmp_path / "c.yaml"
    path.write_text(CLUSTER.replace(*change))
    assert expected in error(cluster_of, str(path))


def test_a_pipe_is_no_cluster_file(tmp_path):
    """Nor is a device: it may never end."""
    assert "is no file" in error(cluster_of, "/dev/zero")
