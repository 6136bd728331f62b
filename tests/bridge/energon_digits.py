"""The example's script on Megatron-Energon's own loader: its documents as shards of a data set, shuffled, and
``dataloader_save`` as ``examples/multimodal`` of Megatron-LM has it.

``DIP_ENERGON`` holds JSON: ``data``: the folder of the data set, ``states``: that for states of the loader, which has
so many ``workers``, ``kill``: the iteration in which the last rank ends as if its host had gone (SIGKILL), before the
schedule is through with it.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

OPTIONS = json.loads(os.environ.get("DIP_ENERGON", "{}"))


def write_documents(folder: Path, items: Any, shards: int = 2) -> None:
    """Write ``items``, dicts of tensors by index, as a data set that Energon can read."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    folder.mkdir(parents=True)
    names = [f"shard-{number}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        with tarfile.open(folder / name, "w") as shard:
            for index in range(number, len(items), shards):
                file = io.BytesIO()
                torch.save(items[index] | {"index": torch.tensor(index)}, file)
                entry = tarfile.TarInfo(f"{index:05d}.item")
                entry.size = file.tell()
                file.seek(0)
                shard.addfile(entry, file)
    BaseWebdatasetFactory.prepare_dataset(
        folder, names, split_parts_patterns=[("train", ".*")], shuffle_seed=None, workers=1
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


class Cycling:
    """An Energon loader as Megatron-LM's loop takes it, without what Energon puts beside a sample."""

    def __init__(self, loader: Any):
        self._loader = loader
        self._items = self._cycle()

    def _cycle(self) -> Iterator[Any]:
        while True:
            yield from self._loader

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in next(self._items).items() if not name.startswith("__")}

    def save_state(self) -> Any:
        return self._loader.save_state_rank()


def loader() -> Cycling:
    """Of the training set; restored if there is a state beside the checkpoint that is gone on from."""
    from megatron.core import parallel_state
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )
    from megatron.training import get_args
    from megatron.training.checkpointing import get_checkpoint_name

    @stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return {**{k: v for k, v in sample.items() if k.startswith("__")}, **torch.load(io.BytesIO(sample["item"]))}

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]  # noqa: RUF012

        @stateless
        def batch(self, samples: list[Any]) -> Any:
            (sample,) = samples
            return {name: value[None] if torch.is_tensor(value) else value for name, value in sample.items()}

    args = get_args()
    workers = WorkerConfig(
        rank=parallel_state.get_data_parallel_rank(), world_size=parallel_state.get_data_parallel_world_size(),
        num_workers=OPTIONS["workers"], data_parallel_group=parallel_state.get_data_parallel_group(),
    )  # fmt: skip
    dataset = get_train_dataset(
        OPTIONS["data"], worker_config=workers, batch_size=1, shuffle_buffer_size=8, max_samples_per_sequence=5,
        virtual_epoch_length=7, task_encoder=Encoder(),
    )  # fmt: skip
    made = get_savable_loader(dataset)
    if args.load is not None and args.dataloader_save:
        name = f"train_dataloader_dprank{parallel_state.get_data_parallel_rank():03d}.pt"
        state = Path(get_checkpoint_name(args.dataloader_save, args.iteration, pipeline_rank=0, basename=name))
        if state.exists():
            made.restore_state_rank(torch.load(state, weights_only=False)["dataloader_state_dict"])
    return Cycling(made)


def main() -> None:
    from dip_megatron.megatron.cpu import install_cpu_platform

    install_cpu_platform()
    import megatron.training

    pretrain, last = megatron.training.pretrain, int(os.environ["WORLD_SIZE"]) - 1

    def on_energon(config: Any, _: Any, model_type: Any, forward_step: Any, *rest: Any, **kwargs: Any) -> Any:
        def provider(sizes: Any) -> Any:
            megatron.training.get_args().dataloader_save = OPTIONS["states"]
            return loader(), None, None

        def step(*given: Any) -> Any:
            here = megatron.training.get_args().curr_iteration + 1
            if torch.is_grad_enabled() and here == OPTIONS.get("kill") and int(os.environ["RANK"]) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return forward_step(*given)

        provider.is_distributed = True  # type: ignore[attr-defined]
        return pretrain(config, provider, model_type, step, *rest, **kwargs)

    megatron.training.pretrain = on_energon
    sys.argv[0] = str(Path(__file__).resolve().parents[1] / "megatron" / "recording_digits.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
