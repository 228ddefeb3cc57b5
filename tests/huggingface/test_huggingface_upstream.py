"""Other releases of `transformers`: what they add is accepted, what they take away is said in one sentence."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
import transformers
from tiny_transformers import tiny_model, tokens
from transformers.models.llama import modeling_llama

from helix_megatron.errors import HelixError
from helix_megatron.huggingface import from_pretrained, make_groups, plan, save_pretrained, shard
from helix_megatron.huggingface.upstream import check, require_trainer

NAMES = ("past_key_values", "cache")  # of the cache, so far


def sharded() -> Any:
    groups = make_groups(2, 2)
    model = tiny_model("llama")
    helix = {"intra_head_parallel_size": 2, "query_layout": "segments"}  # attention that is ours
    return shard(model, helix, tensor_group=groups.tensor, intra_head_group=groups.intra_head)


def passing(model: Any, **keywords: Any) -> Any:
    """The same model in a release whose layers pass these keywords to attention besides."""
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | keywords), with_kwargs=True
        )
    return model


def renaming(model: Any) -> Any:
    """The same model in a release that gives the cache another name."""

    def rename(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {"memory" if name in NAMES else name: kwargs[name] for name in kwargs}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(rename, with_kwargs=True)
    return model


class Paged:
    """A cache that is not the library's: continuous batching has one."""

    def update(self, key: Any, value: Any, layer: int) -> Any:
        return key, value


def run_additions() -> dict[str, Any]:
    ids = tokens()
    with torch.no_grad():
        logits = {
            "as it is": sharded()(ids).logits,
            "one more keyword": passing(sharded(), hint=3, table={}, position_bias=None)(
                ids
            ).logits,
        }

        def generate(model: Any) -> Any:
            return model.generate(ids, max_new_tokens=4, do_sample=False)

        generated = {"as it is": generate(sharded()), "renamed": generate(renaming(sharded()))}
        refused = {}
        for name, value in (("softcap", 30.0), ("s_aux", torch.ones(2)), ("pages", Paged())):
            with pytest.raises(HelixError) as error:
                passing(sharded(), **{name: value})(ids)
            refused[name] = str(error.value)
    return {"logits": logits, "generated": generated, "refused": refused}


def test_what_a_release_adds(pool):
    """5.24 renamed the cache and every test went red; what changes no score must change no result."""
    found = pool.run(run_additions, world_size=2, timeout=120)[0]
    logits, generated = found["logits"], found["generated"]
    assert torch.equal(logits["one more keyword"], logits["as it is"])
    assert logits["as it is"].abs().max() > 0
    assert torch.equal(generated["renamed"], generated["as it is"])
    whole = tiny_model("llama").generate(tokens(), max_new_tokens=4, do_sample=False)
    assert torch.equal(generated["as it is"], whole)
    for name, kind in (("softcap", "float"), ("s_aux", "Tensor"), ("pages", "Paged")):
        assert f"{name}, a {kind}, does not work with Helix attention" in found["refused"][name]


def run_static_cache() -> list[torch.Tensor]:
    """Logits of a prompt in two pieces over a static cache, cut and whole."""
    found = []
    for model in (sharded(), tiny_model("llama")):
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        name = "cache" if "cache" in signature_of(model) else "past_key_values"
        with torch.no_grad():
            pieces = [model(piece, **{name: cache}).logits for piece in tokens().split(7, dim=1)]
        found.append(torch.cat(pieces, dim=1))
    return found


def signature_of(model: Any) -> Any:
    import inspect

    return inspect.signature(model.forward).parameters


def test_a_static_cache_is_written_where_it_goes_on(pool):
    """The static cache of 5.2 is told where; untold, it writes each piece over the first."""
    found, wanted = pool.run(run_static_cache, world_size=2, timeout=60)[0]
    assert torch.allclose(found, wanted, atol=1e-5)


def without(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """A release whose class has no such attribute."""
    for kind in owner.__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)


def test_this_release_has_all_that_is_needed():
    """At both ends of the range that setup.py allows."""
    assert check() == []


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (
            transformers.PreTrainedModel,
            "initialize_weights",
            "from_pretrained has no rotary tables",
        ),
        (transformers.PreTrainedModel, "tp_size", "would be cut again"),
        (transformers.PreTrainedConfig, "_attn_implementation", "would go unnoticed"),
        (transformers.Cache, "update", "generation with a cache does not work"),
    ],
)
def test_a_release_without_an_attribute(monkeypatch, owner, name, said):
    """An AttributeError from inside, or a check that sees nothing, would not tell what to install."""
    model = tiny_model("llama")
    without(monkeypatch, owner, name)
    (problem,) = [problem for problem in check() if f".{name}:" in problem]
    assert said in problem
    assert "Helix is tested with transformers 5.2.0 to 5.24.0; try pip install" in problem
    with pytest.raises(HelixError) as error:
        shard(model, 2, tensor_group=None)  # type: ignore[arg-type]
    assert str(error.value) == problem


def test_a_trainer_that_asks_elsewhere_for_norms(monkeypatch):
    """A method that is overridden and never called would clip by one rank's norm."""
    without(monkeypatch, transformers.Trainer, "create_accelerator_and_postprocess")
    with pytest.raises(
        HelixError, match="ShardedTrainer cannot take gradient norms over all ranks"
    ):
        require_trainer()


@pytest.mark.parametrize("kind", ["LlamaAttention", "LlamaMLP"])
def test_a_release_that_renames_a_class(monkeypatch, kind):
    """Modules are known by their form: what was found by its class would stay whole."""
    cuts = plan(tiny_model("llama"), 2, 2).cuts
    monkeypatch.setattr(modeling_llama, kind, type("Renamed", (getattr(modeling_llama, kind),), {}))
    assert plan(tiny_model("llama"), 2, 2).cuts.keys() == cuts.keys()
    assert check() == []


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        (
            "self_attn",
            "k_proj",
            "attention of class LlamaAttention has no q_proj, k_proj and v_proj",
        ),
        ("mlp", "up_proj", "has no MLP whose form is known"),
    ],
)
def test_a_release_that_renames_a_projection(module, name, said):
    """What is not found would stay whole, beside parts that are cut."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        part = getattr(layer, module)
        part.renamed = getattr(part, name)
        delattr(part, name)
    with pytest.raises(HelixError, match=said):
        plan(model, 2, 2)


def test_a_release_that_renames_an_input(monkeypatch):
    """A mask under another name would be taken for one of the keywords that change nothing."""

    def forward(self: Any, hidden_states: Any, position_embeddings: Any, mask: Any = None) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    said = "a LlamaAttention that is not given attention_mask"
    with pytest.raises(HelixError, match=said):
        plan(tiny_model("llama"), {"intra_head_parallel_size": 2, "query_layout": "segments"}, 2)
    assert any(said in problem for problem in check())


def run_notices(directory: str) -> list[str]:
    """Notices of deprecation from loading, generating, training and saving, of warnings and of logs."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    groups = make_groups(2, 2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        save_pretrained(sharded(), directory)
        model = from_pretrained(directory, 2, tensor_group=groups.tensor)
        model.generate(tokens(), max_new_tokens=2, do_sample=False)
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
    logger.removeHandler(handler)
    kinds = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    return [
        f"{w.filename}:{w.lineno} {w.message}" for w in seen if issubclass(w.category, kinds)
    ] + [record.getMessage() for record in records if "deprecated" in record.getMessage()]


def test_no_notice_of_deprecation(pool, tmp_path):
    """A notice today is an error in a release to come."""
    for notices in pool.run(run_notices, str(tmp_path), world_size=2, timeout=120):
        assert notices == []
