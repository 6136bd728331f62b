"""Model descriptions: the shipped ones are the paper's, files and Python say the same, faults are named."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.describe.files import ConfigurationError, shipped
from dip_megatron.describe.model import (
    GatedDeltaNet,
    LanguageHead,
    ModelError,
    ModulePartition,
    ModuleShape,
    MultimodalModel,
    Parallel,
    Partition,
    Projector,
    TokenEmbedding,
    TransformerLayer,
    even_partition,
    load_model,
    spread,
)

PAPER = {
    # name: {module: (layers, hidden, ffn, heads, kv groups, billions of parameters)}, tp, pp, gpus
    "vlm-s": ({"vision": (63, 1792, 15360, 16, 16, 5), "language": (32, 4096, 14336, 32, 8, 8)}, 4, 4, 16),
    "vlm-m": ({"vision": (63, 1792, 15360, 16, 16, 5), "language": (64, 5120, 27648, 40, 8, 32)}, 8, 4, 32),
    "vlm-l": ({"vision": (48, 6144, 24576, 48, 48, 22), "language": (80, 8192, 29568, 64, 8, 72)}, 8, 8, 64),
    "vlm-xl": ({"vision": (48, 6144, 24576, 48, 48, 22), "language": (96, 12288, 49152, 96, 96, 175)}, 8, 16, 16384),
    "t2v-s": ({"language": (32, 4096, 14336, 32, 8, 8), "diffusion": (28, 3584, 10240, 28, 28, 5)}, 4, 4, 16),
    "t2v-l": ({"language": (64, 5120, 27648, 40, 8, 32), "diffusion": (48, 6144, 24576, 48, 48, 30)}, 8, 8, 64),
    "t2v-xl": ({"language": (80, 8192, 29568, 64, 8, 72), "diffusion": (48, 6144, 24576, 48, 48, 30)}, 8, 8, 6144),
}


@pytest.mark.parametrize("name", PAPER)
def test_shipped_models_are_the_papers(name: str) -> None:
    modules, tp, pp, gpus = PAPER[name]
    model = load_model(name)
    assert (model.parallel.tp, model.parallel.pp, model.parallel.gpus) == (tp, pp, gpus)
    assert [m.name for m in model.modules] == list(modules)
    for shape in model.modules:
        layers, hidden, ffn, heads, groups, billions = modules[shape.name]
        layer = shape.layer
        assert (shape.layers, layer.hidden, layer.ffn, layer.heads, layer.kv_groups) == (
            layers, hidden, ffn, heads, groups,
        )  # fmt: skip
        # The nominal size is a rounded one: within an eighth of it (ViT "5B" has 4.4B).
        assert shape.parameters == pytest.approx(billions * 1e9, rel=0.125)


PUBLISHED = {
    # name: parameters as published, and of the description those that the published count leaves out
    "qwen2-5-vl-7b": (8_292_166_656, 0),  # safetensors index of Qwen2.5-VL-7B-Instruct
    "qwen2-5-vl-32b": (33_452_718_336, 0),  # the same of -32B-Instruct
    "qwen2-5-vl-72b": (73_410_777_344, 0),  # of -72B-Instruct
    "qwen3-vl-8b": (8_767_123_696, 0),  # of Qwen3-VL-8B-Instruct
    "qwen3-vl-32b": (33_357_390_064, 0),  # of -32B-Instruct
    "qwen3-5-vl-27b": (27_780_000_000, 0),  # 55.56 GB of bfloat16, multi-token prediction included
    # 5.5B and 32.8B (arXiv 2508.18265, table 1); three heads of 128 that only fill up those of tp 4.
    "internvl3-5-38b": (38_400_000_000, 45 * 4 * 3200 * 3 * 128),
    # arXiv 2503.19786, table 1: 417M, 1416M of embeddings, 25600M; the head is the same table.
    "gemma3-27b": (27_433_000_000, 262208 * 5376),
    # Parameters of Hugging Face's classes, built from the published configurations without memory; those of Qwen3.5
    # leave out multi-token prediction, a layer with experts and its projection.
    "qwen3-vl-30b-a3b": (31_070_754_032, 0),
    "qwen3-vl-235b-a22b": (235_670_022_896, 0),
    "qwen3-5-vl-35b-a3b": (35_107_181_936, 840_000_000),
    "qwen3-5-vl-397b-a17b": (396_802_360_816, 6_590_000_000),
    "glm-4-5v": (107_744_743_936, 0),
    # 60 layers of 384 experts of three 7168 x 2048 matrices make 1014.7B, one shared and the router 2.8B, the dense
    # layer 0.4B, latent attention 61 x 0.101B, embeddings and head 2.35B, the encoder 0.47B.
    "kimi-k2-5": (1_026_900_000_000, 0),
    # Of its class, built so: published as 16.4B. Latent attention has 1.2M more a layer than the grouped one.
    "kimi-vl-a3b": (16_407_654_384, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_parameters(name: str) -> None:
    published, beside = PUBLISHED[name]
    assert load_model(name).parameters - beside == pytest.approx(published, rel=0.01)


def test_every_shipped_model_loads() -> None:
    assert set(PAPER) <= set(shipped("models"))
    for name in shipped("models"):
        assert load_model(name).name == name


def test_python_and_yaml_describe_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        """
name: tiny
parallel: {tp: 2, pp: 3, dp: 4, sequence_parallel: false, distributed_optimizer: false}
modules:
  language:
    input: text
    layers: 5
    layer: {hidden: 64, ffn: 256, heads: 4, kv_groups: 2, gated: true, causal: true}
    stem: {kind: token_embedding, vocabulary: 100}
    head: {kind: language_head, vocabulary: 100, tied: true}
    trainable: [stem, head]
"""
    )
    assert load_model(path) == MultimodalModel(
        "tiny",
        (
            ModuleShape(
                "language",
                "text",
                5,
                TransformerLayer(64, 256, 4, 2, gated=True, causal=True),
                TokenEmbedding(100),
                LanguageHead(100, tied=True),
                trainable=("stem", "head"),
            ),
        ),
        Parallel(2, 3, 4, sequence_parallel=False, distributed_optimizer=False),
    )


VALID = """
name: tiny
modules:
  vision:
    input: images
    layers: 2
    layer: {hidden: 64, ffn: 256, heads: 4, kv_groups: 4}
    stem: {kind: patch_embedding, patch: 14}
    head: {kind: projector, inner: 64, output: 128}
  language:
    input: text
    layers: 2
    layer: {hidden: 128, ffn: 256, heads: 4, kv_groups: 4, causal: true}
    upstream: [vision]
"""


@pytest.mark.parametrize(
    ("old", "new", "place", "reason"),
    [
        ("layers: 2", "layers: 0", "modules.vision.layers", "greater than 0"),
        ("layers: 2", "layer_count: 2", "modules.vision.layer_count: no such key", ", layers, "),
        ("patch: 14", "patches: 14", "modules.vision.stem", "did you mean patch?"),
        ("kind: projector", "kind: mlp", "modules.vision.head", "projector"),
        ("output: 128", "output: 96", "modules.language.upstream", "width 96"),
        ("hidden: 64, ffn: 256, heads: 4", "hidden: 64, ffn: 256, heads: 5", "layer.heads", "don't divide"),
        ("upstream: [vision]", "upstream: [audio]", "modules.language.upstream", "audio"),
        ("name: tiny", "name: tiny\nparallel: {tp: 8}", "modules.vision.layer.heads", "tp 8"),
        ("input: text", "input: two words", "modules.language.input", "pattern"),
        (
            "input: text",
            "input: words\n    stem: {kind: token_embedding, vocabulary: 8}",
            "modules.language.input",
            "reads text, not words",
        ),
        ("name: tiny", "name: [tiny", "line", "expected"),
        ("name: tiny", "", "name", "required"),
    ],
)
def test_faults_in_files_are_named_on_one_line(tmp_path: Path, old: str, new: str, place: str, reason: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(VALID)
    load_model(path)
    path.write_text(VALID.replace(old, new, 1))
    with pytest.raises(ConfigurationError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert place in message
    assert reason in message


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"vlm-zz.*vlm-s"):
        load_model("vlm-zz")


def test_parallel_sizes_can_be_overridden_and_are_checked() -> None:
    model = load_model("vlm-s").with_parallel(tp=2, pp=2, sequence_parallel=False)
    assert model.parallel == Parallel(2, 2, 1, sequence_parallel=False)
    with pytest.raises(ModelError, match="tp 3"):
        model.with_parallel(tp=3)


def test_projector_reduction_counts_patches_per_token() -> None:
    vision = load_model("vlm-s").module("vision")
    assert isinstance(vision.head, Projector)
    # 728 pixels in patches of 14, 4 x 4 of them a token: 169 tokens from 52 x 52 patches.
    assert 169 * vision.reduction == 52 * 52


def test_window_attention_excepts_every_nth_layer() -> None:
    layer = TransformerLayer(64, 256, 4, 4, window=16, full_attention_every=4)
    module = ModuleShape("vision", "images", 9, layer)
    assert [i for i in range(9) if module.full_attention(i)] == [3, 7]


def test_every_fourth_layer_of_linear_attention_attends_to_all() -> None:
    language = load_model("qwen3-5-vl-27b").module("language")
    assert [i for i in range(9) if language.full_attention(i)] == [3, 7]
    linear, full = (sum(language.layer_parameters(i)) for i in (0, 3))
    hidden, inner = 5120, 48 * 128
    mixed = 2 * 16 * 128 + inner
    expected = hidden * (mixed + inner + 2 * 48) + 4 * mixed + inner * hidden
    assert linear - full == expected - hidden * (3 * 24 * 256 + 2 * 4 * 256)
    odd = replace(language, upstream=(), layer=replace(language.layer, linear_attention=GatedDeltaNet(6, 48)))
    with pytest.raises(ModelError, match=r"linear_attention: 6 and 48 heads can't be split over tp 4"):
        MultimodalModel("odd", (odd,), Parallel(tp=4))


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 16))
def test_spread_conserves_layers_and_is_even(layers: int, segments: int, ranks: int) -> None:
    rows = spread(layers, segments, ranks)
    counts = [n for row in rows for n in row]
    assert (len(rows), {len(row) for row in rows}) == (segments, {ranks})
    assert sum(counts) == layers
    assert max(counts) - min(counts) <= 1


def test_partition_is_checked_against_the_model() -> None:
    model = load_model("vlm-s")
    good = even_partition(model, {"vision": 2}, {"vision": 12})
    good.check(model)
    assert good.module("vision").first_layer[1][0] == sum(good.module("vision").layers[0])
    with pytest.raises(ModelError, match="add up to 62"):
        Partition((ModulePartition("vision", ((16, 16, 16, 14),)), good.modules[1])).check(model)
    with pytest.raises(ModelError, match="2 ranks"):
        Partition((ModulePartition("vision", ((32, 31),)), good.modules[1])).check(model)
    with pytest.raises(ModelError, match="the partition has"):
        Partition(good.modules[:1]).check(model)
    with pytest.raises(ModelError, match="unit_size"):
        ModulePartition("vision", ((1,),), 0)
