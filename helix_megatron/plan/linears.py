"""Parts of a layer: norms, residuals, column- and row-parallel linears with their collectives, MLP, experts."""

from __future__ import annotations

from helix_megatron.plan.collective_time import Group
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.settings import Software
from helix_megatron.plan.steps import BACKWARD, FORWARD, Recorder


def norm(record: Recorder, name: str, model: ModelSpec, own: float, software: Software) -> None:
    shape = f"[{own:.0f}, {model.hidden_size}]"
    record.stream(name, own * model.hidden_size, 2, 4, shape)
    if software.precision == "fp8":  # written once more, and transposed, in one byte each
        record.stream(f"{name} to fp8", own * model.hidden_size, 0.5, 0.0, shape)


def residual(record: Recorder, name: str, model: ModelSpec, own: float, dropout: bool) -> None:
    """Bias, dropout and residual in one kernel: three tensors, and the mask of a byte per element."""
    mask = 0.5 if dropout else 0.0
    shape = f"[{own:.0f}, {model.hidden_size}]"
    record.stream(name, own * model.hidden_size, 3 + mask, 2 + mask if dropout else 0.0, shape)


def cast(record: Recorder, name: str, elements: float, software: Software) -> None:
    """fp8: read in bf16, write it and its transpose; its gradient the same."""
    if software.precision == "fp8":
        record.stream(f"{name} to fp8", elements, 2.0, 2.0)


def column_parallel(
    record: Recorder,
    name: str,
    rows: float,
    columns: float,
    inner: float,
    layout: Layout,
    software: Software,
) -> None:
    """A linear whose input all tensor parallel ranks need: collectives before and beside its products."""
    size, group = rows * inner * record.element, layout.tp_group
    start = len(record.steps)
    record.gemm(name, rows, columns, inner)
    product, wgrad, dgrad = (step.seconds for step in record.steps[start:])
    if software.tp_overlap != "full":
        product = 0.0
    if software.tp_overlap == "none":
        wgrad = dgrad = 0.0
    if layout.sequence_parallel:
        record.collective(
            f"{name} input again", BACKWARD, "all-gather", size, group, "tp", beside=dgrad
        )
        record.collective(
            f"{name} gradient", BACKWARD, "reduce-scatter", size, group, "tp", beside=wgrad
        )
        if group.ranks > 1:
            record.move_last(start + 2)
        record.collective(f"{name} input", FORWARD, "all-gather", size, group, "tp", beside=product)
    else:
        record.collective(
            f"{name} gradient", BACKWARD, "all-reduce", size, group, "tp", beside=wgrad
        )
    if group.ranks > 1:
        record.move_last(start if layout.sequence_parallel else start + 2)


def row_parallel(
    record: Recorder,
    name: str,
    rows: float,
    columns: float,
    inner: float,
    layout: Layout,
    software: Software,
) -> None:
    """A linear whose output is summed over tensor parallel ranks."""
    size, group = rows * columns * record.element, layout.tp_group
    start = len(record.steps)
    record.gemm(name, rows, columns, inner)
    product, _, dgrad = (step.seconds for step in record.steps[start:])
    if software.tp_overlap != "full":
        product = dgrad = 0.0
    if not layout.sequence_parallel:
        record.collective(
            f"{name} output", FORWARD, "all-reduce", size, group, "tp", beside=product
        )
        return
    record.collective(
        f"{name} output", FORWARD, "reduce-scatter", size, group, "tp", beside=product
    )
    record.collective(f"{name} gradient", BACKWARD, "all-gather", size, group, "tp", beside=dgrad)


def mlp(
    record: Recorder,
    model: ModelSpec,
    layout: Layout,
    software: Software,
    tokens: float,
    own: float,
) -> None:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size / layout.tp
    norm(record, "MLP norm", model, own, software)
    column_parallel(record, "linear_fc1", tokens, ffn * model.fc1_factor, hidden, layout, software)
    activation(record, model, tokens * ffn, software)
    row_parallel(record, "linear_fc2", tokens, hidden, ffn, layout, software)
    residual(record, "MLP residual", model, own, software.dropout)


def activation(record: Recorder, model: ModelSpec, elements: float, software: Software) -> None:
    forward, backward = (3, 5) if model.gated else (2, 3)
    record.stream("activation", elements, forward, backward)
    cast(record, "activation", elements, software)


def experts_mlp(
    record: Recorder, model: ModelSpec, layout: Layout, software: Software, own: float
) -> None:
    """Router, dispatch by all-to-all, experts, and back; balanced routing is assumed."""
    hidden = model.hidden_size
    norm(record, "MLP norm", model, own, software)
    precision = "fp32" if software.precision == "fp32" else "bf16"
    record.gemm("router", own, model.experts, hidden, precision=precision)
    # How many tokens each expert gets: over tensor parallel ranks for the auxiliary loss, over all of them for
    # the sizes of the all-to-all; whole numbers of 8 bytes.
    counts = 8.0 * model.experts
    record.collective("expert loads", FORWARD, "all-reduce", counts, layout.tp_group, "tp")
    record.collective(
        "tokens per expert", FORWARD, "all-gather", layout.ep * counts, layout.ep_group, "ep"
    )
    copies = own * model.topk
    record.stream("permutation", copies * hidden, 2, 2)
    size, weights = copies * hidden * record.element, copies * record.element
    gathered, experts_here = copies * layout.etp, model.experts / layout.ep
    expert_group = Group(layout.etp)
    for phase in (FORWARD, BACKWARD):
        # Each token travels with the weight of its expert.
        record.collective("dispatch", phase, "all-to-all", size + weights, layout.ep_group, "ep")
        kind = "all-gather" if phase == FORWARD else "reduce-scatter"
        gathers = (size + weights) * layout.etp
        record.collective("expert input", phase, kind, gathers, expert_group, "tp")
    rows, ffn = gathered / experts_here, model.moe_ffn / layout.etp
    record.gemm("experts fc1", rows, ffn * model.fc1_factor, hidden, batch=experts_here)
    activation(record, model, gathered * ffn, software)
    record.gemm("experts fc2", rows, hidden, ffn, batch=experts_here)
    for phase in (FORWARD, BACKWARD):
        kind = "reduce-scatter" if phase == FORWARD else "all-gather"
        record.collective("expert output", phase, kind, size * layout.etp, expert_group, "tp")
        record.collective("combine", phase, "all-to-all", size, layout.ep_group, "ep")
    record.stream("permutation back", copies * hidden, 2, 2)
    if model.shared_ffn:
        tokens = own * layout.tp if layout.sequence_parallel else own
        ffn = model.shared_ffn / layout.tp
        column_parallel(
            record, "shared fc1", tokens, ffn * model.fc1_factor, hidden, layout, software
        )
        activation(record, model, tokens * ffn, software)
        row_parallel(record, "shared fc2", tokens, hidden, ffn, layout, software)
    residual(record, "MLP residual", model, own, software.dropout)
