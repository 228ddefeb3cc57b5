"""Why a size cannot be, of the model, the job or Megatron: (kind, clause), with the nearest size that can."""

from __future__ import annotations

from helix_megatron.errors import divisors, listed
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.settings import Job
from helix_megatron.plan.stages import dealings

Refusal = tuple[str, str] | None
INDIVISIBLE = "not divisible"
LEAST_CHUNK = 256  # tokens of a sequence on a context parallel rank; fewer were never worth a ring


def nearest(number: int, wanted: int) -> str:
    """The divisors next to a number, below and above."""
    below = [d for d in divisors(number) if d < wanted]
    above = [d for d in divisors(number) if d > wanted]
    return listed(below[-1:] + above[:1])


def of_tensor_parallel(model: ModelSpec, tp: int, *, training: bool) -> Refusal:
    """Widths that TP ranks must divide; `helix serve` keeps linear attention whole that they do not divide."""
    widths = {"hidden size": model.hidden_size}
    if model.dense_layers:
        widths["FFN hidden size"] = model.ffn
    if model.shared_ffn:
        widths["hidden size of the shared experts"] = model.shared_ffn
    linear = model.special.linear
    if linear and training:
        widths[f"number of {linear.dealt}"] = linear.shares
        if linear.groups == 1:  # ranks share it, each with some of its states
            widths[f"number of {linear.name} states"] = linear.key
        elif linear.groups and model.special.has_pattern:
            widths[f"number of {linear.name} groups"] = linear.groups
    latent = model.special.latent
    if latent and training:  # Megatron cuts their projections by rows
        widths["latent of queries"] = latent.query_rank
        widths["latent with its rotated part"] = latent.cached
    for name, size in widths.items():
        if size % tp:
            reason = f"{name} {size} is not divisible by {tp}; nearest that divide it: "
            return INDIVISIBLE, reason + nearest(size, tp)
    return None


def of_whole_heads(model: ModelSpec, tp: int, *, cached: bool) -> Refusal:
    """Heads that stock Megatron deals whole; a latent that all ranks keep together, where it is `cached`."""
    heads, kv_heads = model.num_attention_heads, model.num_query_groups
    latent = model.special.latent
    if latent and cached and latent.cached % tp:
        reason = f"a latent of {latent.cached} elements cannot be kept by {tp} ranks; nearest that divide it: "
        return INDIVISIBLE, reason + nearest(latent.cached, tp)
    if heads % tp:
        reason = (
            f"{heads} query heads cannot be dealt whole to {tp} ranks; nearest that divide them: "
        )
        return INDIVISIBLE, reason + nearest(heads, tp)
    if kv_heads % tp and tp % kv_heads:
        reason = (
            f"Megatron needs {tp} to divide the {kv_heads} key-value heads or be a multiple of them"
        )
        return INDIVISIBLE, f"{reason}; nearest: {nearest(kv_heads, tp)}"
    return None


def of_cut_heads(model: ModelSpec) -> Refusal:
    """Attention whose heads Helix does not cut."""
    if model.special.latent is None:
        return None
    why = "latent attention has one head of latents and no key-value heads to cut; it is planned as plain TP"
    return "not modelled", f"{why}, with the latents once on all ranks"


def of_context_parallel(model: ModelSpec, job: Job, cp: int, *, asked: bool) -> Refusal:
    """A sequence that a ring of ranks shares; `asked` lets its parts be as small as they come."""
    if job.task == "train" and (model.special.linear or model.special.latent):
        return "not modelled", f"{listed(model.special.names)} trains on the whole of a sequence"
    if job.task == "decode":
        what = "a token's cache dealt to context parallel ranks"
        return "not modelled", f"{what}; cache sequence of Helix is the nearest"
    if job.sequence % (2 * cp):
        return INDIVISIBLE, f"sequence length {job.sequence} is not divisible by 2·{cp} chunks"
    tokens = job.sequence // cp
    if tokens < LEAST_CHUNK and not asked:
        return "too small", f"leaves {tokens} tokens of a sequence to a rank, under {LEAST_CHUNK}"
    return None


def of_stages(layers: int, pp: int) -> Refusal:
    """Layers that pipeline stages share, evenly but for the first stage and the last."""
    if dealings(layers, pp):
        return None
    reason = f"{layers} layers cannot be dealt to {pp} stages, even with fewer on the first and the last; "
    return INDIVISIBLE, f"{reason}nearest that divide them: {nearest(layers, pp)}"


def of_batch(batch: int, dp: int, micro_batch: int) -> Refusal:
    """A global batch that replicas and micro-batches divide."""
    unit = dp * micro_batch
    if batch % unit == 0:
        return None
    reason = f"global batch {batch} is not divisible by {dp} × {micro_batch}; nearest that is: "
    return INDIVISIBLE, reason + str(-(-batch // unit) * unit)
