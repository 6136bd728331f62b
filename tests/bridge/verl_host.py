"""The host's CPUs as an accelerator of verl's, which has no other that tests could run on."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


@PlatformRegistry.register("host")
class Host(PlatformBase):
    """The host's CPUs as verl asks of an accelerator."""

    device_name = "cpu"
    vendor_name = "host"
    device_module = SimpleNamespace(**vars(torch.cpu), empty_cache=lambda: None, memory_allocated=lambda: 0,
                                    memory_reserved=lambda: 0, mem_get_info=lambda: (0, 0))  # fmt: skip

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        return "gloo"

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def visible_devices_envvar(self) -> str:
        return "NO_DEVICES"

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def nvtx_range(self, msg: str) -> Any:
        return contextlib.nullcontext()

    def cudart(self) -> Any:
        return None

    def nothing(self, *_: Any, **__: Any) -> None:
        """An accelerator would do something."""

    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = nothing

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)
