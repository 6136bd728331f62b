"""The one definition behind flags, YAML and defaults of a DIP run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)  # fmt: skip

from .core.faults import reason
from .describe.files import ConfigurationError, not_yaml, training_file


class ModuleConfig(BaseModel):
    """How one modality module is cut. Anything left out is the partitioner's choice."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    layers: list[list[int]] | None = Field(None, description="layers per chunk, [segment][pipeline rank]")
    segments: int | None = Field(None, ge=1, description="number of segments K, layers spread evenly")
    unit_size: int | None = Field(None, ge=1, description="most instances in a sub-microbatch (null: all)")
    placement: Literal["segmented", "replicated"] | None = Field(
        None, description="segmented: cut over all ranks; replicated: whole on every rank, each of which encodes some "
        "of the sub-microbatches; null: by layers, or the partitioner's choice")  # fmt: skip

    @property
    def gives_layers(self) -> bool:
        """Whether it says which layers stand where."""
        return self.layers is not None or self.segments is not None or self.placement == "replicated"


class DipConfig(BaseModel):
    """Everything a user may set. Flags override the YAML file, which overrides these defaults."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    schedule: str = Field("off", description="off: Megatron as it was; static: one order for every batch; dynamic: a "
                          "plan for each batch; or any other schedule by its name")  # fmt: skip
    plan_file: Path | None = Field(None, description="plans to run, written by `dip plan` or by a run with trace_plans "
                                   "(or that run's trace_dir); a batch that none of them matches is planned under "
                                   "schedule, or ends the run if that is off")  # fmt: skip
    modules: dict[str, ModuleConfig] = Field(default_factory=dict, description="by module name: vision, language, ...")
    cluster: str = Field("auto", description="cost model's hardware: a name (h100, h200, b200, h800, h20, cpu) or "
                         "a YAML file; auto: by the device's name, any other GPU as an h100")  # fmt: skip
    costs: Path | None = Field(None, description="measured costs of `dip profile`")
    planner_workers: NonNegativeInt = Field(1, description="searching threads per replica, in one planner process, at "
                                             "most half the cores; 0: plan in the trainer")  # fmt: skip
    search_budget: NonNegativeFloat | None = Field(None, description="seconds; null: what the running iteration leaves")
    search_evaluations: PositiveInt | None = Field(None, description="schedules tried per plan instead of seconds: "
                                                   "plans then depend on search_seed, not on time")  # fmt: skip
    search_seed: int = 0
    recalibrate: bool = Field(True, description="correct the cost model by what the stages of earlier iterations took")
    split_backward: bool = Field(True, description="let plans defer weight gradients (W) where the layers can")
    recompute: bool = Field(True, description="let plans recompute activations, layer by layer")
    offload: bool = Field(False, description="let plans move activations to host memory")
    memory_limit: PositiveFloat | None = Field(None, description="bytes a rank may use; null: the cluster's")
    override: bool = Field(False, description="replace the virtual stages and layouts that a loop's own settings give")
    read_ahead: bool = Field(True, description="let the next iteration's microbatches be read while one trains")
    balance: Literal["off", "swap", "free"] = Field(
        "off", description="swap: exchange microbatches between data-parallel replicas, as many each as before, so "
        "that all end together; free: any number each, where the loop weights by tokens")  # fmt: skip
    resample: bool = Field(False, description="with balance, also move samples between microbatches, where the loop "
                           "says how it packs them and weights by tokens")  # fmt: skip
    pairing: bool = Field(False, description="with schedule off: let Megatron's own schedule have each replica's "
                          "microbatches longest first, so that replicas that share experts wait less")  # fmt: skip
    trace_dir: Path | None = Field(None, description="where to write iterations.jsonl, trace.json and timeline.png")
    trace_plans: bool = Field(False, description="also write the plans that ran to trace_dir, as plans.jsonl: a run "
                              "can be repeated from them")  # fmt: skip
    timeout_seconds: PositiveFloat = Field(600.0, description="bound on every wait for another rank")

    @field_validator("schedule")
    @classmethod
    def _known(cls, name: str) -> str:
        """Any name of the registry, which is imported only where it is needed."""
        if name not in ("off", "static", "dynamic"):
            from .schedulers.registry import check_name

            check_name(name)
        return name

    @property
    def on(self) -> bool:
        """Whether DIP schedules anything."""
        return self.schedule != "off" or self.plan_file is not None

    @property
    def pairs(self) -> bool:
        """Whether Megatron's own schedule gets its microbatches in an order of DIP's."""
        return self.pairing and not self.on

    @staticmethod
    def load(path: str | Path | None, overrides: dict[str, Any]) -> DipConfig:
        """A YAML file's values under ``overrides`` (None: not given). Raises ConfigurationError in one line."""
        values: dict[str, Any] = {}
        place = "flags"
        if path is not None:
            path = training_file(path)
            place = str(path)
            try:
                loaded = yaml.safe_load(path.read_text())
            except OSError as error:
                raise ConfigurationError(f"{path}: can't be read: {error.strerror}") from error
            except yaml.YAMLError as error:
                raise ConfigurationError(f"{path}: {not_yaml(error)}") from error
            if not isinstance(loaded, dict):
                raise ConfigurationError(
                    f"{path}: must be a mapping of settings, such as `schedule: dynamic`, got {type(loaded).__name__}"
                )
            values = loaded
        values |= {k: v for k, v in overrides.items() if v is not None}
        try:
            return DipConfig(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            raise ConfigurationError(f"{place}: {where}: {reason(first, DipConfig)}") from error
