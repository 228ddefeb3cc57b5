"""What the engine says of tokens, and how it changes logits, beside transformers' own model and processors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inference_models import Collected
from tiny_transformers import COMMON, randomize
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from helix_megatron.inference.request import Output, Request, Sampling, TokenLogprobs

FP32 = 2e-4  # of log-probabilities, whose logits differ by rounding
PROMPT = tuple(range(60, 81))
CHANGED = Sampling(
    max_tokens=20,
    temperature=0,
    presence_penalty=0.7,
    frequency_penalty=0.5,
    repetition_penalty=1.4,
    logit_bias=((7, 1.5), (9, -100.0)),
)


class Listener(Collected):
    """Keeps what comes with the tokens, too."""

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: list[TokenLogprobs] = []
        self.prompt: tuple[TokenLogprobs, ...] = ()
        self.shared = 0

    def __call__(self, output: Output) -> None:
        super().__call__(output)
        self.logprobs += output.logprobs
        self.prompt += output.prompt_logprobs
        self.shared += output.shared


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A Llama of 2 layers with random weights and 2 key-value heads."""
    torch.manual_seed(3)
    sizes = COMMON | {"vocab_size": 256, "max_position_embeddings": 256, "bos_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    randomize(model)
    path = tmp_path_factory.mktemp("logprobs")
    model.save_pretrained(path)
    return path


def answers(path: str, samplings: list[Sampling], **options: Any) -> list[dict[str, Any]] | None:
    """Of an engine on these ranks, for `PROMPT` with each of the samplings."""
    import torch.distributed as dist

    from helix_megatron.inference.arguments import add_checkpoint_arguments, inference_config
    from helix_megatron.inference.batching_flags import EngineOptions
    from helix_megatron.inference.engine import follow
    from helix_megatron.inference.start import start

    parser = add_checkpoint_arguments(argparse.ArgumentParser())
    flags = parser.parse_args(["--load", path, "--tokenizer", "byte", "--dtype", "fp32"])
    config = inference_config(vars(flags), dist.get_world_size())
    chosen = EngineOptions(page_size=4, prefill_chunk=8, cache_memory=0.01, **options)
    runner, engine = start(config, chosen, max_waiting=100)
    if engine is None:
        follow(runner)
        return None
    listeners = [Listener() for _ in samplings]
    engine.submit([Request(PROMPT, *pair) for pair in zip(samplings, listeners, strict=True)])
    engine.stop()
    engine.run()
    names = "tokens", "logprobs", "prompt", "shared"
    return [{name: getattr(one, name) for name in names} for one in listeners]


def expected_logprobs(path: Path, tokens: list[int]) -> torch.Tensor:
    """transformers' log-probabilities [position, token] after each of these tokens."""
    model = transformers.LlamaForCausalLM.from_pretrained(path).eval()
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def check(found: list[TokenLogprobs], wanted: torch.Tensor, tokens: list[int], top: int) -> None:
    assert [one.token for one in found] == tokens
    for one, row in zip(found, wanted, strict=True):
        assert one.logprob == pytest.approx(row[one.token].item(), abs=FP32)
        best = row.topk(top)
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=FP32)
        assert all(value == pytest.approx(row[t].item(), abs=FP32) for t, value in one.top)


@pytest.mark.parametrize(
    "cache",
    [
        "batch",
        pytest.param("sequence", marks=pytest.mark.full("inference")),
        pytest.param("segment", marks=pytest.mark.full("inference")),
    ],
)
def test_logprobs_of_prompt_and_output(pool, checkpoint, cache):
    """Of every token, and of the likeliest ones; the same for a prompt whose pages are another one's."""
    count = 10
    all_of_them = Sampling(max_tokens=count, temperature=0, logprobs=4, prompt_logprobs=3)
    output_only = Sampling(max_tokens=count, temperature=0, logprobs=2)
    warm = Sampling(max_tokens=count, temperature=1.3, top_k=40, seed=2, logprobs=1)
    samplings = [all_of_them, output_only, warm]
    found = pool.run(answers, str(checkpoint), samplings, cache_layout=cache, world_size=2)[0]
    for sampling, answer in zip(samplings, found, strict=True):
        tokens = [*PROMPT, *answer["tokens"]]
        wanted = expected_logprobs(checkpoint, tokens)
        rows = wanted[len(PROMPT) - 1 : -1]
        check(answer["logprobs"], rows, answer["tokens"], sampling.logprobs or 0)
        if sampling.prompt_logprobs is None:
            assert answer["prompt"] == ()
        else:
            check(answer["prompt"], wanted[: len(PROMPT) - 1], list(PROMPT[1:]), 3)
    assert found[0]["tokens"] == found[1]["tokens"] != found[2]["tokens"]
    assert [answer["shared"] > 0 for answer in found] == [False, True, True]


def test_greedy_tokens_with_bias_and_penalties(pool, checkpoint):
    """Those of transformers' model and processors; OpenAI's penalties by their formula."""
    found = pool.run(answers, str(checkpoint), [CHANGED], world_size=2)[0][0]["tokens"]
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()
    bias = SequenceBiasLogitsProcessor([[[token], value] for token, value in CHANGED.logit_bias])
    repetition = RepetitionPenaltyLogitsProcessor(CHANGED.repetition_penalty)
    tokens, plain = list(PROMPT), []
    with torch.inference_mode():
        for _ in range(CHANGED.max_tokens):
            ids = torch.tensor([tokens])
            logits = model(ids).logits[:, -1]
            plain.append(int(logits.argmax()))
            scores = repetition(ids, bias(ids, logits.clone()))[0]
            output = tokens[len(PROMPT) :]
            for token in set(output):
                scores[token] -= CHANGED.presence_penalty
                scores[token] -= CHANGED.frequency_penalty * output.count(token)
            tokens.append(int(scores.argmax()))
    assert found == tokens[len(PROMPT) :]
    assert plain != found, "they changed something"
