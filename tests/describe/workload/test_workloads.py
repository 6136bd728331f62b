"""Batches, sub-microbatches, workload files and the synthetic mixes."""

import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.describe.model import Packing, load_model
from dip_megatron.describe.workload import (
    Clip,
    GlobalBatch,
    Microbatch,
    Sample,
    WorkloadError,
    even_slices,
    format_batch,
    image_bounds,
    load_workload,
    make_units,
    pack_clips,
    pack_documents,
    parse_batch,
    read_workload,
    write_workload,
)
from tests.drawn import settings

VLM, T2V = load_model("vlm-s"), load_model("t2v-s")

tokens = st.lists(st.integers(1, 5000), max_size=20).map(tuple)
clips = st.builds(Clip, st.integers(0, 500), st.integers(1, 256), st.integers(1, 1024), st.integers(1, 1024))


@st.composite
def documents(draw: st.DrawFn) -> Microbatch:
    images, audios, text = draw(tokens), draw(tokens), draw(st.integers(1, 9000))
    total = text + sum(images) + sum(audios)
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), max_size=5))) if total > 1 and draw(st.booleans()) else []
    ends = [*cuts, total]
    sequences = tuple(b - a for a, b in zip([0, *ends], ends, strict=False)) if cuts else ()
    return Microbatch(text, images, audios, sequences=sequences)


microbatches = st.one_of(documents(), st.lists(clips, min_size=1, max_size=8).map(lambda c: Microbatch(clips=tuple(c))))


@given(st.lists(microbatches, min_size=1, max_size=6))
def test_a_batch_survives_its_file_line(items: list[Microbatch]) -> None:
    batch = GlobalBatch(tuple(items))
    assert parse_batch(format_batch(batch)) == batch


def test_a_file_survives_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    batches = load_workload("vlm-mix", VLM, 3, 4, seed=5)
    write_workload(path, batches)
    assert read_workload(path) == batches
    assert load_workload(path, VLM, 2, 3) == tuple(GlobalBatch(b.microbatches[:3]) for b in batches[:2])


@pytest.mark.parametrize(
    ("line", "place", "reason"),
    [
        ('{"microbatches": []}', "microbatches", "at least one"),
        ('{"batches": []}', "line.batches", "unknown field"),
        ('{"microbatches": [{"text_tokens": 1}, {"text_tokens": "7"}]}', "microbatches[1].text_tokens", '"7"'),
        ('{"microbatches": [{"text_tokens": true}]}', "microbatches[0].text_tokens", "true"),
        ('{"microbatches": [{"text_tokens": 1.0}]}', "microbatches[0].text_tokens", "1.0"),
        ('{"microbatches": [{"text_tokens": 1, "images": [3, 0]}]}', "microbatches[0].images[1]", "at least 1 token"),
        ('{"microbatches": [{"text_tokens": 1, "images": 3}]}', "microbatches[0].images", "list"),
        ('{"microbatches": [{"text_tokens": 1, "points": [3]}]}', "microbatches[0].points", "unknown field"),
        ('{"microbatches": [{"text_tokens": 1, "others": [3]}]}', "microbatches[0].others", "object"),
        ('{"microbatches": [{"text_tokens": 1, "others": {"points": [0]}}]}', "others.points[0]", "at least 1 token"),
        ('{"microbatches": [{"text_tokens": 1, "others": {"images": [2]}}]}', "others.images", "beside others"),
        ('{"microbatches": [{"text_tokens": 0}]}', "microbatches[0].text_tokens", "empty"),
        ('{"microbatches": [{"text_tokens": -1}]}', "microbatches[0].text_tokens", "negative"),
        ('{"microbatches": [{"text_tokens": 9, "sequences": [4]}]}', "microbatches[0].sequences", "add up to 4"),
        ('{"microbatches": [{"clips": [{"frames": 1, "height": 2, "width": 3}]}]}', "clips[0].text_tokens", "missing"),
        ('{"microbatches": [{"text_tokens": 3, "text_tokens": 4}]}', "text_tokens", "twice"),
        ('{"microbatches": [3]}', "microbatches[0]", "object"),
        ('{"microbatches": [', "line", "not JSON"),
        ('{"microbatches": [{"text_tokens": 1' + "0" * 5000 + "}]}", "line", "a number too long"),
        ("[1]", "line", "object"),
    ],
)
def test_malformed_lines_name_file_line_field_and_reason(tmp_path: Path, line: str, place: str, reason: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text('{"microbatches": [{"text_tokens": 5}]}\n\n' + line + "\n")
    with pytest.raises(WorkloadError) as caught:
        read_workload(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert "\n" not in message
    assert place in message.removeprefix(f"{path}:3: ").split(": ")[0]
    assert reason in message


@given(st.text(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_line_is_accepted_or_refused_in_another_way(line: str) -> None:
    with suppress(WorkloadError):
        assert parse_batch(line).microbatches


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text("\n\n")
    with pytest.raises(WorkloadError, match="no batch"):
        read_workload(path)
    with pytest.raises(WorkloadError, match="file: "):
        read_workload(tmp_path / "none.jsonl")


@given(st.integers(0, 300), st.none() | st.integers(1, 60))
def test_slices_are_even_and_cover_everything(count: int, size: int | None) -> None:
    slices = even_slices(count, size)
    lengths = [n for _, n in slices]
    assert sum(lengths) == count
    assert [first for first, _ in slices] == [sum(lengths[:i]) for i in range(len(lengths))]
    if count:
        assert len(slices) == (1 if size is None else -(-count // size))
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) >= 1


@given(st.lists(st.integers(0, 48), min_size=1, max_size=8), st.none() | st.integers(1, 12))
def test_vlm_units_cover_the_images_and_all_feed_the_llm(images: list[int], size: int | None) -> None:
    batch = [Microbatch(9, (169,) * n) for n in images]
    units = make_units(VLM, batch, {"vision": size})
    assert [u.id for u in units] == list(range(len(units)))
    for m, count in enumerate(images):
        vision = [u for u in units if u.microbatch == m and u.module == "vision"]
        (language,) = [u for u in units if u.microbatch == m and u.module == "language"]
        assert sum(u.count for u in vision) == count
        assert all(u.downstream == (language.id,) for u in vision)
        assert language.downstream == ()
        assert size is None or all(u.count <= size for u in vision)


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=5), st.none() | st.integers(1, 8), st.none() | st.integers(1, 8)
)
def test_text_to_video_units_wait_for_the_prompts_of_their_clips(
    counts: list[int], prompts: int | None, slices: int | None
) -> None:
    batch = [Microbatch(clips=(Clip(20, 16, 256, 256),) * n) for n in counts]
    units = make_units(T2V, batch, {"language": prompts, "diffusion": slices})
    for unit in units:
        if unit.module != "diffusion":
            continue
        feeding = [u for u in units if unit.id in u.downstream]
        covered = {i for u in feeding for i in range(u.first, u.first + u.count)}
        needed = set(range(unit.first, unit.first + unit.count))
        assert needed <= covered
        assert all(needed & set(range(u.first, u.first + u.count)) for u in feeding)
        assert {u.microbatch for u in feeding} == {unit.microbatch}


@settings(max_examples=50)
@given(
    st.lists(
        st.builds(Sample, st.integers(0, 9000), st.lists(st.integers(1, 700), max_size=60).map(tuple)), max_size=40
    )
)
def test_packing_keeps_the_limits_and_the_order(samples: list[Sample]) -> None:
    packing = Packing()
    packed = list(pack_documents(samples, packing))
    for m in packed:
        assert 0 < m.tokens <= packing.max_tokens
        assert len(m.images) <= packing.max_images
        assert sum(m.sequences) == m.tokens
    whole = [s for s in samples if 0 < s.tokens <= packing.max_tokens and len(s.images) <= packing.max_images]
    if len(whole) == len([s for s in samples if s.tokens]):
        lengths = [n for m in packed for n in m.sequences]
        assert lengths == [s.tokens for s in whole][: len(lengths)]


@given(st.lists(clips, max_size=40))
def test_clips_are_packed_below_sixteen_seconds(items: list[Clip]) -> None:
    packing = Packing()
    for m in pack_clips(items, packing):
        frames = sum(c.frames for c in m.clips)
        assert len(m.clips) <= packing.max_clips
        assert frames < packing.max_seconds * packing.fps or len(m.clips) == 1


def test_latent_tokens_follow_moviegen() -> None:
    # 256 frames of 768 x 768 are 32 x 96 x 96 latents, and 73,728 tokens in patches of 1 x 2 x 2 (arXiv 2410.13720).
    assert Clip(0, 256, 768, 768).latent_tokens((8, 8, 8), (1, 2, 2)) == 73_728
    assert Clip(0, 1, 1, 1).latent_tokens((8, 8, 8), (1, 2, 2)) == 1


@pytest.mark.parametrize(
    ("name", "model"),
    [("vlm-mix", "vlm-s"), ("vlm-documents", "vlm-m"), ("vlm-dynamic", "vlm-l"), ("vision-audio-mix",
    "vision-audio-llm"),
     ("t2v-mix", "t2v-s"), ("t2v-768", "t2v-l")],
)  # fmt: skip
def test_mixes_depend_on_the_seed_alone_and_fit_the_model(name: str, model: str) -> None:
    described = load_model(model)
    first = load_workload(name, described, 2, 6, seed=1)
    assert first == load_workload(name, described, 2, 6, seed=1)
    assert first != load_workload(name, described, 2, 6, seed=2)
    assert [len(b.microbatches) for b in first] == [6, 6]
    # A longer run starts with the shorter one.
    assert load_workload(name, described, 3, 6, seed=1)[:2] == first


def test_mix_means_are_the_published_ones() -> None:
    batches = load_workload("vlm-documents", VLM, 40, 16, seed=0)
    documents = sum(len(m.sequences) for b in batches for m in b.microbatches)
    images = sum(len(m.images) for b in batches for m in b.microbatches)
    # LAION 1, OBELICS 2.5, MMC4 5.64 images a document, in equal shares; cutting to one microbatch loses a little.
    assert images / documents == pytest.approx((1 + 2.5 + 5.64) / 3, rel=0.05)


def test_the_dynamic_run_follows_the_papers_bounds() -> None:
    bounds = [image_bounds(16, 32, 5, 20, i) for i in range(40)]
    assert bounds[:5] == [(0, 32), (4, 32), (8, 32), (12, 32), (16, 32)]
    assert bounds[19] == (0, 0)
    assert bounds[20:] == bounds[:20]
    assert all(a[0] >= b[0] and a[1] >= b[1] for a, b in pairwise(bounds[4:20]))
    batches = load_workload("vlm-dynamic", VLM, seed=3)
    assert len(batches) == 40
    for (low, high), batch in zip(bounds, batches, strict=True):
        assert all(low <= len(m.images) <= high and m.tokens == 8192 for m in batch.microbatches)


@pytest.mark.parametrize(
    ("name", "model", "reason"),
    [("t2v-mix", VLM, "clips"), ("vlm-mix", T2V, "clips"), ("vision-audio-mix", T2V, "clips")],
)
def test_a_workload_for_another_kind_of_model_is_refused(name: str, model: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_workload(name, model, 1, 2)  # type: ignore[arg-type]


def test_no_iterations_are_refused() -> None:
    with pytest.raises(WorkloadError, match="iterations: must be 1 to"):
        load_workload("vlm-mix", VLM, 0, 2)
