"""The fields of a plan file as a pydantic model: the check of what is read, and the source of the JSON schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .versions import renamed

VERSION = 2

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$")]


class Strict(BaseModel):
    """A record whose fields must all be there, with exactly these names and types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ModuleRecord(Strict):
    """One modality module."""

    name: Name
    segments: Annotated[int, Field(ge=1)]
    layers: Annotated[list[list[Count]], Field(description="[segment][rank]: transformer layers of each chunk")]
    trainable: Annotated[list[list[bool]], Field(description="[segment][rank]; empty: every chunk trains")]
    upstream: Annotated[list[Name], Field(description="modules whose outputs feed the first segment")]
    reversed: Annotated[list[bool], Field(description="[segment]: runs from the last rank to rank 0; empty: none does")]
    replicated: Annotated[
        bool, Field(description="whole on every rank, in one segment; each of its units runs on one rank")
    ] = False


class UnitRecord(Strict):
    """One sub-microbatch; ``instances`` is [first, count]."""

    id: Annotated[Count, Field(description="position in the list")]
    module: Name
    microbatch: Count
    instances: Annotated[list[Count], Field(min_length=2, max_length=2)]
    downstream: Annotated[list[Count], Field(description="ids of the downstream units that wait for this one")]
    rank: Annotated[Count | None, Field(description="where a unit of a replicated module runs")] = None


class OperationTimes(Strict):
    """Seconds of the operations of one unit in one segment, one entry per rank."""

    module: Name
    segment: Count
    unit: Count
    F: Annotated[list[Seconds], Field(description="forward")]
    B: Annotated[list[Seconds], Field(description="input gradient")]
    W: Annotated[list[Seconds], Field(description="weight gradient")]
    BW: Annotated[list[Seconds], Field(description="both gradients at once")]


class OperationBytes(Strict):
    """Bytes that the operations of one unit in one segment hold, one entry per rank."""

    module: Name
    segment: Count
    unit: Count
    activation: Annotated[list[Bytes], Field(description="from the start of F to the end of B or BW")]
    deferred_activation: Annotated[
        list[Bytes], Field(description="what a split backward still holds from the end of B to the end of W")
    ]


class TensorRecord(Strict):
    """One tensor of a payload."""

    name: str
    shape: list[Count]
    dtype: str
    differentiable: bool


class PayloadRecord(Strict):
    """The tensors that travel from virtual microbatch ``source`` to ``target``, or between the ranks of one virtual
    microbatch if both are equal. With ``rank``: those that this rank sends."""

    source: Count
    target: Count
    rank: Annotated[Count | None, Field(description="the rank that sends, where ranks send different things")] = None
    tensors: list[TensorRecord]


class PredictedRecord(Strict):
    """What the simulator expects."""

    iteration_time: Seconds
    lower_bound: Seconds
    bubble_ratio: Annotated[float, Field(ge=0, le=1)]
    peak_bytes: Annotated[list[Bytes], Field(description="per rank, static bytes included")]


class SearchRecord(Strict):
    """How the plan was found."""

    seconds: Seconds
    evaluations: Count
    workers: Count
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)]


class CoupledRecord(Strict):
    """Marks a plan as one of a set, of replicas that share experts. The plans of a set are consecutive lines."""

    replica: Count
    replicas: Annotated[int, Field(ge=1)]
    experts: Annotated[
        dict[Name, list[list[list[bool]]]],
        Field(description="by module, [segment][rank][layer]: whether the layer is a mixture of experts"),
    ]
    repeating: Annotated[
        list[str], Field(description="memory strategies that run a layer's collectives again in its backward")
    ]


class PlanRecord(Strict):
    """One iteration's plan: one line of a plan file."""

    version: Literal[2]
    schedule: Annotated[str, Field(min_length=1, description="name of the schedule that made it, e.g. dip")]
    ranks: Annotated[int, Field(ge=1)]
    modules: Annotated[list[ModuleRecord], Field(min_length=1)]
    units: Annotated[list[UnitRecord], Field(min_length=1)]
    durations: Annotated[list[OperationTimes], Field(description="by unit, then segment")]
    activation_bytes: Annotated[list[OperationBytes], Field(description="by unit, then segment")]
    transfer: Annotated[
        list[Seconds],
        Field(description="seconds of one transfer of a virtual microbatch's output, in the order of durations"),
    ]
    overhead: Annotated[
        list[Seconds] | None,
        Field(description="per rank: seconds of each operation in which it doesn't compute but sends and receives"),
    ] = None
    memory_limit: Annotated[list[Bytes | None], Field(description="per rank; null: none")]
    static_bytes: Annotated[list[Bytes], Field(description="per rank: parameters, gradients, optimizer state")]
    payloads: list[PayloadRecord]
    actions: Annotated[list[list[str]], Field(description="[rank]: what the rank does, in order")]
    predicted: PredictedRecord
    search: SearchRecord
    coupled: Annotated[
        CoupledRecord | None,
        Field(description="in plans of replicas that must run together; left out of all others"),
    ] = None


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """A line of version 1, whose fields had other names, with the names of version 2."""
    line: dict[str, Any] = renamed(data, {"latency": "transfer"}) | {"version": VERSION}
    for name, fields in (
        ("units", {"feeds": "downstream"}),
        ("activation_bytes", {"held": "activation", "kept": "deferred_activation"}),
    ):
        if name in line:
            line[name] = renamed(line[name], fields)
    return line


def plan_json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of one line of a plan file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **PlanRecord.model_json_schema()}
