"""A data set of Megatron-Energon's with conversations about pictures, and a tokenizer for them, written by a test."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

COUNTS = (1, 0, 3, 2, 1, 4)
"""Pictures of the conversations, in turn."""
_LOADER = """
def sample_loader(parts):
    found = dict(parts["json"])
    pictures = [parts[name] for name in sorted(parts) if name.endswith("png")]
    return {"__key__": parts["__key__"], "__restore_key__": parts["__restore_key__"], "images": pictures,
            "texts": found["texts"]}


def part_filter(part):
    return part == "json" or part.endswith("png")
"""


def write_conversations(folder: Path, count: int = 48, shards: int = 3) -> None:
    """Write ``count`` conversations in as many shards, ready for Energon."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    draw = np.random.default_rng(3)
    folder.mkdir(parents=True)
    names = [f"shard-{number}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        with tarfile.open(folder / name, "w") as shard:
            for index in range(number, count, shards):
                _write(shard, index, draw)
    BaseWebdatasetFactory.prepare_dataset(
        folder, names, split_parts_patterns=[("train", ".*"), ("val", names[0])], shuffle_seed=None, workers=1
    )
    (folder / ".nv-meta" / "sample_loader.py").write_text(_LOADER)
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump({
        "sample_type": {"__module__": "megatron.energon", "__class__": "SimilarityInterleavedSample"},
        "sample_loader": "sample_loader.py:sample_loader", "part_filter": "sample_loader.py:part_filter",
    }))  # fmt: skip


def _write(shard: tarfile.TarFile, index: int, draw: np.random.Generator) -> None:
    pictures = COUNTS[index % len(COUNTS)]
    files = {}
    for number in range(pictures):
        height, width = (int(side) for side in draw.integers(20, 80, 2))
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "png")
        files[f"{number}.png"] = file.getvalue()
    asked = " ".join(str(value) for value in draw.integers(0, 100, int(draw.integers(2, 12))))
    texts = [
        {"from": "human", "value": "<image>" * pictures + f"what of {asked}?"},
        {"from": "gpt", "value": f"answer {index}: " + "so it is. " * int(draw.integers(1, 4))},
    ]
    files["json"] = json.dumps({"texts": texts}).encode()
    for name, content in files.items():
        entry = tarfile.TarInfo(f"{index:05d}.{name}")
        entry.size = len(content)
        shard.addfile(entry, io.BytesIO(content))


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes as Hugging Face's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet]
    bytes_ = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [], unk_token="<unk>"))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=bytes_, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_prefix_space=False
    ).save_pretrained(folder)
