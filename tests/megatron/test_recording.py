"""A script's model provider is called for a model's arguments alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from megatron.core.models.gpt.gpt_model import GPTModel

from dip_megatron.describe.files import ConfigurationError
from dip_megatron.families.known import known_families
from dip_megatron.megatron.build import record_blueprint


def provided(then: Callable[[Any], Any]) -> dict[str, Any]:
    """What is known of a GPT whose provider does something with it."""

    def provider() -> GPTModel:
        model = GPTModel(config=None, transformer_layer_spec=None, vocab_size=8, max_sequence_length=4)
        then(model)
        return model

    return record_blueprint(known_families(), provider)[1].kwargs


def freeze(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "decoder" in name


@pytest.mark.parametrize(
    ("then", "method"),
    [
        (freeze, "named_parameters"), (lambda model: model.requires_grad_(False), "requires_grad_"),
        (lambda model: [p.zero_() for p in model.parameters()], "parameters"),
        (lambda model: model.apply(print), "apply"),
        (lambda model: model.register_forward_hook(print), "register_forward_hook"),
        (lambda model: model.load_state_dict({}), "load_state_dict"),
    ],
)  # fmt: skip
def test_what_a_provider_does_with_the_model_is_not_lost(then: Callable[[Any], Any], method: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{method}\(\) of a model without layers\); .* behind get_model"):
        provided(then)


def test_what_changes_nothing_is_allowed() -> None:
    """Loops do it themselves with what is built."""
    assert provided(lambda model: model.cpu().float().train())["vocab_size"] == 8
