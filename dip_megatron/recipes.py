"""Provided training recipes: a model on a cluster with its partition, Megatron flags and what a plan says it needs.

A recipe is a folder of ``configs/train``: ``recipe.yaml`` (what it is for, and the numbers of its plans),
``partition.yaml`` (from the partitioner), ``dip.yaml`` (for ``--dip-config``) and ``megatron.args`` (flags). All but
the first part of ``recipe.yaml`` is made by ``scripts/make_recipes.py`` from the model. Recipes are planned, not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from .config import DipConfig
from .describe.cost import Cluster, load_cluster
from .describe.files import ConfigurationError, read_yaml
from .describe.model import ModuleShape, MultimodalModel, Partition, load_model
from .describe.partition import read_partition

FOLDER = Path(__file__).parent / "configs" / "train"


class PlanningResult(BaseModel):
    """What the plans of the recipe's batches say: mean seconds an iteration and their lower bound; 1e9 bytes that each
    pipeline rank holds at its fullest, activations of the largest batch included; by name of the schedule, mean seconds
    without DIP, where that fits."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    batches: PositiveInt
    iteration_seconds: PositiveFloat
    lower_bound_seconds: PositiveFloat
    memory_gb: Annotated[list[PositiveFloat], Field(min_length=1)]
    without_dip: dict[str, PositiveFloat] = Field(default_factory=dict)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    cluster: str
    nodes: PositiveInt
    workload: str
    microbatches: PositiveInt
    script: str
    lacks: list[str] = Field(default_factory=list)
    planned: PlanningResult | None = None


@dataclass(frozen=True)
class Recipe:
    """One recipe, read and checked. ``flags``: Megatron's, as in ``megatron.args``; ``script``: what builds the model;
    ``lacks``: what a run needs that this project doesn't bring."""

    name: str
    folder: Path
    model: MultimodalModel
    cluster: Cluster
    nodes: int
    workload: str
    microbatches: int
    script: str
    lacks: tuple[str, ...]
    planned: PlanningResult
    partition: Partition
    config: DipConfig
    flags: tuple[str, ...]


def recipe_names() -> tuple[str, ...]:
    """Names of the provided recipes."""
    return tuple(sorted(p.parent.name for p in FOLDER.glob("*/recipe.yaml")))


def load_recipe(name: str) -> Recipe:
    """A provided recipe by name. Raises ConfigurationError (file, place, reason) where files are wrong or disagree."""
    folder = FOLDER / name
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ConfigurationError(f"{name}: no such recipe; there are {', '.join(recipe_names())}")
    data = read_yaml(path, _File)
    model, cluster = load_model(data.model), load_cluster(data.cluster)
    if data.planned is None:
        raise ConfigurationError(f"{path}: planned: missing; make it with scripts/make_recipes.py {name}")
    if model.parallel.gpus != data.nodes * cluster.gpus_per_node:
        raise ConfigurationError(
            f"{path}: nodes: {data.nodes} of {cluster.gpus_per_node} GPUs, {model.name} is laid out for "
            f"{model.parallel.gpus}"
        )
    if len(data.planned.memory_gb) != model.parallel.pp:
        raise ConfigurationError(
            f"{path}: planned.memory_gb: {len(data.planned.memory_gb)} ranks, the model has {model.parallel.pp}"
        )
    partition = read_partition(folder / "partition.yaml", model)
    config = DipConfig.load(folder / "dip.yaml", {})
    if config != DipConfig(**dip_settings(data.cluster, partition)):
        raise ConfigurationError(f"{folder / 'dip.yaml'}: modules: not what partition.yaml says")
    flags = read_flags(folder / "megatron.args")
    if flags != megatron_flags(model, data.microbatches):
        raise ConfigurationError(
            f"{folder / 'megatron.args'}: not the flags of {model.name}; run scripts/make_recipes.py {name}"
        )
    return Recipe(
        name=name,
        folder=folder,
        model=model,
        cluster=cluster,
        nodes=data.nodes,
        workload=data.workload,
        microbatches=data.microbatches,
        script=data.script,
        lacks=tuple(data.lacks),
        planned=data.planned,
        partition=partition,
        config=config,
        flags=flags,
    )


def dip_settings(cluster: str, partition: Partition) -> dict[str, Any]:
    """The settings of ``dip.yaml``: a plan for each batch on this partition."""
    return {
        "schedule": "dynamic",
        "cluster": cluster,
        "modules": {
            m.module: {"layers": [list(row) for row in m.layers], "unit_size": m.unit_size} for m in partition.modules
        },
    }


def read_flags(path: Path) -> tuple[str, ...]:
    """The flags of an args file, one flag with its value a line. Raises ConfigurationError if it can't be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigurationError(f"{path}: file: {getattr(error, 'strerror', None) or error}") from error
    return tuple(line.strip() for line in lines if line.strip())


def megatron_flags(model: MultimodalModel, microbatches: int) -> tuple[str, ...]:
    """Megatron's flags for the model's language module, its parallel sizes and ``microbatches`` of one packed sequence.

    The shapes of the other modules are the script's to know: Megatron has no flags for them.
    """
    text = next(m for m in model.modules if m.input == "text")
    parallel = model.parallel
    flags = [
        f"--tensor-model-parallel-size {parallel.tp}",
        f"--pipeline-model-parallel-size {parallel.pp}",
        *(["--sequence-parallel"] if parallel.sequence_parallel and parallel.tp > 1 else []),
        *(["--use-distributed-optimizer"] if parallel.distributed_optimizer else []),
        "--bf16",
        "--transformer-impl transformer_engine",
        "--attention-backend flash",
        "--micro-batch-size 1",
        f"--global-batch-size {microbatches * parallel.dp}",
        f"--seq-length {model.packing.max_tokens}",
        f"--max-position-embeddings {model.packing.max_tokens}",
        *_layer_flags(text),
        "--hidden-dropout 0",
        "--attention-dropout 0",
        "--calculate-per-token-loss",
    ]
    return tuple(flags)


def _layer_flags(module: ModuleShape) -> list[str]:
    layer = module.layer
    flags = [
        f"--num-layers {module.layers}",
        f"--hidden-size {layer.hidden}",
        f"--ffn-hidden-size {layer.ffn}",
        f"--num-attention-heads {layer.heads}",
    ]
    if layer.kv_groups != layer.heads:
        flags += ["--group-query-attention", f"--num-query-groups {layer.kv_groups}"]
    if layer.head_dim * layer.heads != layer.hidden:
        flags.append(f"--kv-channels {layer.head_dim}")
    if layer.gated:
        flags += ["--swiglu", "--normalization RMSNorm", "--disable-bias-linear"]
    return [*flags, "--position-embedding-type rope", "--untie-embeddings-and-output-weights"]
