"""What travels between the stages of the three modules, by content: the planner's workers know a model by this alone.

Nothing here imports torch or Megatron, so that a worker starts in a second.
"""

from __future__ import annotations

from dataclasses import dataclass

from dip_megatron import Microbatch, Payload, TensorSpec, Unit

VISION, AUDIO, LANGUAGE = "vision", "audio", "language"


@dataclass(frozen=True)
class ThreeModuleShapes:
    """``widths`` are the hidden sizes by module; ``reductions`` say how many of an encoder's tokens become one of the
    language model."""

    widths: dict[str, int]
    reductions: dict[str, int]
    dtype: str

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """Hidden states ``[tokens of the unit, 1, width]``, an encoder's last ones in the language model's terms."""
        tokens, width = load.tokens, self.widths[LANGUAGE]
        if unit.module != LANGUAGE:
            instances = load.images if unit.module == VISION else load.audios
            tokens = sum(instances[unit.first : unit.first + unit.count])
            if not leaves_module:
                tokens, width = tokens * self.reductions[unit.module], self.widths[unit.module]
        return (TensorSpec("hidden", (tokens, 1, width), self.dtype),)
