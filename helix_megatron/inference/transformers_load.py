"""A model of `transformers` for the engine: what its configuration says, how it is cut, and its weights.

Whatever `helix_megatron.huggingface` can cut by its form can be served, so a model type of tomorrow, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from helix_megatron.checkpoint.huggingface_form import ConvertedFiles
from helix_megatron.checkpoint.huggingface_io import snapshot_of
from helix_megatron.checkpoint.source import Source
from helix_megatron.config import HelixConfig
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError, divisors, listed
from helix_megatron.huggingface import from_pretrained, make_groups
from helix_megatron.huggingface.forms import AttentionForm, attention_form
from helix_megatron.huggingface.load import configuration_of, empty_model, read_configuration
from helix_megatron.inference.transformers_attention import INSTEAD
from helix_megatron.inference.transformers_runner import PagedModel


@dataclass(frozen=True)
class Described:
    """What is known of a model without its weights.

    Args:
        vocab_size: how many tokens it has.
        longest: the positions for which the engine computes what the library does; None: its configuration does
            not say.
        attention: the forms of its attention modules, by path.
        recurrent: the paths of its layers that keep a state and no keys.
        bound: why no sequence can be longer than that, as the rest of a sentence; empty where one can.
        latent_dim: dimensions of a latent with its rotated part; None where keys and values are whole heads.
    """

    vocab_size: int
    longest: int | None
    attention: Mapping[str, AttentionForm]
    recurrent: tuple[str, ...] = ()
    bound: str = ""
    latent_dim: int | None = None

    def segments(self, ranks: int, asked: int | str) -> int:
        """m, with which the model is cut: as asked for, else the smallest that fits.

        Raises:
            HelixError: none fits, or the one asked for does not.
        """
        if self.latent_dim is not None:  # cut by query heads; the one key is everybody's
            self._check_latent(ranks, asked)
            return 1
        fitting = self._fitting(ranks)
        if asked == "auto" and fitting:
            return fitting[0]
        if asked in fitting:
            return int(asked)
        heads = listed(
            dict.fromkeys(f"{f.heads} and {f.kv_heads}" for f in self.attention.values())
        )
        if asked == "auto":
            valid = [p for p in range(1, 2 * ranks) if self._fitting(p)]
            raise HelixError(
                f"{heads} query and key-value heads cannot be dealt to {ranks} ranks with whole query heads. "
                f"Valid numbers of ranks up to {2 * ranks - 1}: {listed(valid)}."
            )
        raise HelixError(
            f"--intra-head-parallel-size {asked} does not fit {heads} query and key-value heads on {ranks} "
            f"ranks with whole query heads. Valid: {listed(fitting) or 'none with so many ranks'}."
        )

    def layout(self, ranks: int, segments: int) -> HeadLayout:
        """How the heads of the cache lie on the ranks; latents are one head that all of them share."""
        form = next(iter(self.attention.values()))
        if self.latent_dim is not None:
            return HeadLayout(
                form.heads,
                1,
                self.latent_dim,
                segments=ranks,
                query_layout="heads",
                rotary="none",
            )
        return HeadLayout(
            form.heads,
            form.kv_heads,
            form.key_dim,
            head_groups=ranks // segments,
            segments=segments,
            query_layout="heads",
            rotary="none",
        )

    def _fitting(self, ranks: int) -> list[int]:
        return [m for m in divisors(ranks) if all(self._fits(f, ranks, m) for f in self._forms)]

    @property
    def _forms(self) -> set[AttentionForm]:
        return set(self.attention.values())

    @staticmethod
    def _fits(form: AttentionForm, ranks: int, segments: int) -> bool:
        helix = HelixConfig(segments, query_layout="heads")
        try:
            form.layout(helix, ranks)
            form.value_layout(helix, ranks)
        except HelixError:
            return False
        return True

    def _check_latent(self, ranks: int, asked: int | str) -> None:
        form = next(iter(self.attention.values()))
        form.layout(HelixConfig(1), ranks)
        if asked not in ("auto", 1):
            raise HelixError(
                f"--intra-head-parallel-size {asked}: latent attention is cut by query heads, and its latents "
                "are kept once on all ranks together. Leave the flag out."
            )


def describe(directory: Path | str) -> Described:
    """Look at a model's configuration; no weight is read.

    Raises:
        HelixError: it is no such model, or has layers that the engine does not know; the text names them.
    """
    return described(empty_model(read_configuration(snapshot_of(Path(directory)))))


def describe_checkpoint(checkpoint: Source) -> Described:
    """`describe` of the Hugging Face model that a checkpoint of training becomes as it is read.

    Raises:
        HelixError: it cannot become one, or as `describe`.
    """
    return described(empty_model(configuration_of(ConvertedFiles(checkpoint))))


def described(model: Any) -> Described:
    """What `describe` says, of a whole model that is there already."""
    config = model.config.get_text_config()
    kind = config.model_type
    attention = {
        path: form
        for path, module in model.named_modules()
        if (
            form := attention_form(
                module, getattr(getattr(module, "config", None), "model_type", kind)
            )
        )
    }
    if not attention:
        raise HelixError(f"{type(model).__name__} has no attention module of a decoder.")
    recurrent = {
        path.rpartition(".")[0]: None
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv1d)
    }
    latents = {
        model.get_submodule(path).kv_a_proj_with_mqa.out_features
        for path, form in attention.items()
        if form.kind == "latent"
    }
    if latents and (len(latents) > 1 or any(f.kind != "latent" for f in attention.values())):
        raise HelixError(
            f"a {kind} model has layers with latents and others, or latents of several sizes, and the engine "
            f"knows one kind in a model. {INSTEAD}"
        )
    longest, bound = _longest(config)
    latent = latents.pop() if latents else None
    return Described(config.vocab_size, longest, attention, tuple(recurrent), bound, latent)


def _longest(config: Any) -> tuple[int | None, str]:
    """The positions a model was made for, and why there cannot be more, see `Described`."""
    longest = getattr(config, "max_position_embeddings", None)
    bounds = [(longest, "")]
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        bounds.append((config.attention_chunk_size, "beyond its attention has chunks"))
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        if rope.get("rope_type") == "dynamic":
            bounds.append((longest, "beyond its rope_type dynamic turns the keys before anew"))
        if rope.get("rope_type") == "longrope":
            short = rope.get("original_max_position_embeddings")
            bounds.append((short, "beyond its rope_type longrope turns the keys before anew"))
    known = ((n, why) for n, why in bounds if n)
    return min(known, key=lambda bound: (bound[0], not bound[1]), default=(None, ""))


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Rotary settings, of all layers or of each kind of layers."""
    if isinstance(parameters, Mapping):
        if "rope_type" in parameters:
            yield parameters
        for inner in parameters.values():
            yield from _ropes(inner)


def load(
    directory: str,
    described: Described,
    segments: int,
    dtype: torch.dtype,
    timeout: float,
    *,
    trust: bool = False,
) -> PagedModel:
    """This rank's part of the model, ready for a step. Collective.

    Args:
        segments: m, with which it is cut.
        timeout: of its process groups, minutes.
        trust: read pickles that could run code.
    """
    from transformers.utils import logging

    ranks = dist.get_world_size()
    groups = make_groups(ranks, segments, timeout_minutes=timeout)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings():
        if dist.get_rank():  # rank 0 says it
            warnings.simplefilter("ignore")
            logging.set_verbosity_error()
        model = from_pretrained(
            directory,
            HelixConfig(segments, query_layout="heads") if segments > 1 else 1,
            tensor_group=groups.tensor,
            intra_head_group=groups.intra_head,
            dtype=dtype,
            device=device,
            trust=trust,
        )
    model.requires_grad_(False)
    shared = groups.tensor if described.latent_dim is not None else groups.intra_head
    return PagedModel(model, list(described.attention), described.recurrent, groups.tensor, shared)
