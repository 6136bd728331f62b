"""The encoder's code as OpenGVLab has published it, in the place of the tests' own in the folder of the tiny InternVL:
all that :mod:`.test_ms_swift` shows of that holds of it, and both compute the same."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.bridge import test_ms_swift as swift
from tests.bridge.tiny_mcore import MCORE_TINY

CHECKOUT, NAME = os.environ.get("DIP_INTERNVL_CHECKOUT"), "internvl-chat"
pytestmark = [
    *swift.pytestmark,
    pytest.mark.skipif(CHECKOUT is None, reason="set DIP_INTERNVL_CHECKOUT to a working tree of OpenGVLab/InternVL"),
    pytest.mark.skipif(importlib.util.find_spec("einops") is None, reason="its code imports einops"),
]
WHERE = "internvl_chat/internvl/model/internvl_chat"
CODE = {f"{kind}_{part}.py" for kind in ("configuration", "modeling") for part in ("intern_vit", "internvl_chat")}
UNUSED = re.compile(r"^from (internvl|peft)[. ].*\n", re.MULTILINE)
"""Other language models, conversations and adapters, of which mcore-bridge asks nothing."""


def put(code: Path, folder: Path) -> None:
    """Its files as a published folder has them: without what isn't in one, and with a language model by default, which
    transformers wants of every configuration. DropPath is asked for where a rate is given alone."""
    for name in CODE:
        text = UNUSED.sub("", (code / name).read_text())
        text = text.replace("from timm.models.layers import DropPath", "from torch.nn import Identity as DropPath")
        (folder / name).write_text(text.replace("{'architectures': ['']}", "{'architectures': ['Qwen2ForCausalLM']}"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("folders")
    MCORE_TINY[NAME].save(made / NAME)
    ours = {path.name: path.read_text() for path in (made / NAME).glob("*.py")}
    put(Path(str(CHECKOUT)) / WHERE, made / NAME)
    assert all((made / NAME / name).read_text() != text for name, text in ours.items())
    return made


@pytest.fixture(scope="module")
def runs(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    trained = {run: asked for run, asked in swift.RUNS.items() if asked["tiny"] == NAME}
    return swift.ran(trained | swift.compared(NAME), folders, tmp_path_factory.mktemp("swift"))


@pytest.mark.parametrize("cut", ["one", "several", "stages"])
def test_segments_train_as_the_class_does(runs: Any, folders: Path, cut: str) -> None:
    swift.test_segments_train_as_the_class_does(runs, folders, NAME, cut)


def test_logits_are_those_of_the_code_written_anew(runs: Any) -> None:
    swift.test_logits_are_those_of_hugging_face(runs, NAME)


@pytest.mark.parametrize("off", [NAME, f"{NAME}-frozen"])
def test_it_trains_as_without_dip(runs: Any, off: str) -> None:
    swift.test_it_trains_as_without_dip(runs, f"{off}-dip", off)
