"""The public names, and where they live.

``dip_megatron`` exports them, each loaded when it is first asked for: planning needs neither torch nor Megatron.
``docs/api.md`` is made of this table and of docstrings (``scripts/make_api.py``).
"""

from __future__ import annotations

from .deprecation import Deprecated

PUBLIC: dict[str, dict[str, str]] = {
    "Train under DIP": {
        "install": "",
        "build_model": "",
        "ConfigurationError": "describe.files",
        "CPU_FLAGS": "megatron.cpu",
        "install_cpu_platform": "megatron.cpu",
    },
    "Describe a model": {
        "MultimodalModel": "describe.model",
        "ModuleShape": "describe.model",
        "TransformerLayer": "describe.model",
        "TokenEmbedding": "describe.model",
        "PatchEmbedding": "describe.model",
        "FeatureEmbedding": "describe.model",
        "LatentEmbedding": "describe.model",
        "LanguageHead": "describe.model",
        "LatentHead": "describe.model",
        "Projector": "describe.model",
        "Packing": "describe.model",
        "Parallel": "describe.model",
        "EVERY_PART": "describe.model",
        "layer_shape": "families.describe",
        "Microbatch": "describe.workload",
        "Clip": "describe.workload",
    },
    "Run a model in stages": {
        "ModelFamily": "families.family",
        "Blueprint": "families.family",
        "Layers": "families.family",
        "ModelProgram": "runtime.protocol",
        "SegmentedProgram": "families.shared.segmented",
        "ModelPart": "families.shared.segmented",
        "ModalityModule": "core",
        "Unit": "core",
        "Operation": "core",
        "Payload": "core",
        "TensorSpec": "core",
        "Inputs": "runtime.protocol",
        "MicrobatchInputs": "runtime.protocol",
        "SamplePacking": "runtime.protocol",
        "Tensors": "runtime.protocol",
        "segment_config": "families.shared.layout",
        "bound": "families.shared.segmented",
        "unwrapped": "families.shared.segmented",
        "dtype_name": "families.shared.segmented",
    },
    "Build a model of parts": {
        "encoder_layer_spec": "families.shared.parts",
        "text_layer_spec": "families.t2v.text_encoder",
        "linear": "families.shared.parts",
        "applied": "families.shared.parts",
        "projector": "families.shared.parts",
        "with_sdpa": "families.shared.sdpa",
        "pack": "families.shared.packing",
        "patchify": "families.t2v.diffusion",
        "draw_by_name": "families.shared.weights",
    },
    "Add a schedule": {
        "ScheduleEntry": "schedulers.entry",
        "Problem": "schedulers.entry",
        "Found": "schedulers.entry",
        "LeastRecompute": "schedulers.entry",
        "MixedChunks": "schedulers.entry",
        "BaselineError": "schedulers.common",
        "register_schedule": "schedulers.registry",
        "find_schedule": "schedulers.registry",
        "schedule_names": "schedulers.registry",
    },
    "Plan without training": {
        "load_model": "describe.model",
        "load_cluster": "describe.cost",
        "load_workload": "describe.workload",
        "Partition": "describe.model",
        "even_partition": "describe.model",
        "read_partition": "describe.partition",
        "build_graph": "describe.cost",
        "OperationGraph": "core",
        "Schedule": "core",
        "Plan": "core",
        "read_plans": "core.files",
        "write_plans": "core.files",
        "PlanFileError": "core.files",
        "verify": "core.verify",
        "PlanError": "core.verify",
        "simulate": "core.simulate",
    },
}
"""By chapter of the page: the module in which a public name is defined, relative to ``dip_megatron``."""

HOMES = {name: home for chapter in PUBLIC.values() for name, home in chapter.items()}
DEPRECATED: dict[str, Deprecated] = {}
"""Old public names; a name leaves when the version reaches its ``gone_in``."""
