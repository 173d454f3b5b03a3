"""The implementations that run selections: plan once, then forward and backward by the kernels of a module.

Where a tensor is not plain, as in torch.compile, the call becomes one operator of torch's dispatcher, and that plans
when it runs: what is selected may depend on numbers that are not there before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from foveate import autodiff
from foveate.attention.call import Call
from foveate.attention.impl import documents, ops
from foveate.attention.impl.plan import Kernels, Plan, facts
from foveate.attention.partial import Partial, lse_dtype
from foveate.dispatch import Facts, Implementation
from foveate.plain import differentiated, traced


class Planned(NamedTuple):
    """A call and what its kernels will run; no plan where the operator of torch's dispatcher will make it."""

    call: Call
    plan: Plan | None


def selected(name: str, kernels: Kernels) -> Implementation[Call, Planned, Partial]:
    """The implementation by these kernels."""
    ops.KERNELS[name] = kernels

    def refuse(call: Call) -> str | None:
        return kernels.refuse(call) or _refuse(call)

    def plan(call: Call) -> Planned:
        call = kernels.in_known_terms(call)
        if traced(*call.tensors):
            return Planned(call, None)
        how = call.biases, call.kind, call.scale, call.softcap, call.dropout
        return Planned(call, documents.plan(kernels, call.q, call.k, call.pattern, call.layout, *how))

    def run(planned: Planned) -> Partial:
        call, plan = planned
        if plan is None:
            return ops.attend_selected(call, name)
        parameters = [bias.parameter for bias in call.biases]
        out, lse = autodiff.run(documents.Attend(kernels, plan), call.q, call.k, call.v, *parameters)
        return Partial(out, lse.to(lse_dtype(call.q)) if call.kind == "softmax" else None)

    return Implementation(name, refuse, plan, run, facts=_facts)


def _refuse(call: Call) -> str | None:
    """Why no kernel can run the call, whichever it is; None if one might."""
    if call.normalise is not None:
        return f"it has softmax, sigmoid and relu weights, not {call.kind}"
    if call.functions:
        return "it has no score functions"
    if differentiated():
        return "derivatives in forward mode and by torch.func are those of the reference"
    if torch.compiler.is_compiling() or not traced(*call.tensors):
        return None
    return None if ops.travels(call) else f"{call.pattern} on {call.layout} cannot be written into what torch records"


def _facts(planned: Planned) -> Facts:
    return {} if planned.plan is None else facts(planned.plan.selected) | {"threads": torch.get_num_threads()}
