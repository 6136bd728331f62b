"""The example's script, writing down which samples were trained on and evaluated; some things about it can be changed.

``DIP_TEST`` holds JSON: ``folder`` for ``samples.rankR.jsonl``, one line per loss in the order in which they were
computed; ``limit``: the number of items of the training set; ``broadcast``: read on one tensor-parallel rank only and
broadcast, as upstream's scripts do; ``reject``: the validated loss (counted from 0) that Megatron's rerun state machine
is told to reject once, on the last rank, and ``fatal``; ``node``: the host's name; ``cut``: sequences of varying
lengths; ``signal``: the iteration in which the last rank gets a SIGTERM; ``trains``: expressions by iteration (0: after
``get_model``), of names of parameters that train from then on; ``described``: arguments of ``freeze`` that DIP's
description of the model is told of, and the model is not; ``loader``: the folder for states of a data loader that can
save its own, ``restore``: the file of one to begin from (``--dataloader-type external``); ``path``: a folder for
the import path; ``uneven``: how many microbatches the exchange between replicas gives the first one more than it had,
of the last one's.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from dip_megatron.megatron.cpu import install_cpu_platform

install_cpu_platform()

import megatron.training  # noqa: E402
import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.rerun_state_machine import get_rerun_state_machine  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "llava_digits"
sys.path.insert(0, str(EXAMPLE))
import documents  # noqa: E402

OPTIONS = json.loads(os.environ["DIP_TEST"])
if "path" in OPTIONS:
    sys.path.insert(0, OPTIONS["path"])
RANK = int(os.environ["RANK"])
LAST = int(os.environ["WORLD_SIZE"]) - 1
validated = 0


class Tap:
    """Passes on items; remembers the last."""

    def __init__(self, iterator: Any):
        self.iterator = iterator
        self.last: Any = None

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        self.last = next(self.iterator)
        return self.last


def record(index: int, train: bool, loss: float, images: int) -> None:
    with (Path(OPTIONS["folder"]) / f"samples.rank{RANK}.jsonl").open("a") as lines:
        iteration = megatron.training.get_args().curr_iteration + 1 if train else None
        line = {"index": index, "train": train, "iteration": iteration, "loss": loss, "images": images}
        lines.write(json.dumps(line) + "\n")
    if train and iteration == OPTIONS.get("signal") and RANK == LAST:
        os.kill(os.getpid(), signal.SIGTERM)


def reject_once(loss: torch.Tensor) -> None:
    """As pretrain_gpt's loss function validates its result."""
    global validated
    machine = get_rerun_state_machine()

    def rejected(_: Any) -> bool:
        return validated == OPTIONS["reject"] and RANK == LAST

    machine.validate_result(
        result=loss.detach().clone(), rejection_func=rejected, message="a loss the test rejects", fatal=OPTIONS["fatal"]
    )
    validated += 1


def from_one_rank(iterator: Any) -> Any:
    group = parallel_state.get_tensor_model_parallel_group()
    while True:
        item = [None if iterator is None else next(iterator)]
        torch.distributed.broadcast_object_list(item, parallel_state.get_tensor_model_parallel_src_rank(), group)
        yield item[0]


def recording(forward_step: Any) -> Any:
    def step(data_iterator: Any, model: Any) -> Any:
        tap = Tap(from_one_rank(data_iterator) if OPTIONS.get("broadcast") else data_iterator)
        output, loss_func = forward_step(tap, model)

        def loss(*arguments: Any) -> Any:
            train = torch.is_grad_enabled()
            result = loss_func(*arguments)
            record(int(tap.last["index"]), train, float(result[0]), tap.last["images"].shape[1])
            if train and OPTIONS.get("reject") is not None:
                reject_once(result[0])
            return result

        return output, loss

    return step


def indexed(get: Any) -> Any:
    def get_item(self: Any, index: int) -> Any:
        item = get(self, index) | {"index": index}
        if OPTIONS.get("cut"):
            for name in ("tokens", "labels", "position_ids", "loss_mask"):
                item[name] = item[name][: len(item[name]) - 3 * (index % 4)]
            images = int((item["tokens"] == documents.IMAGE).sum())
            item["images"] = item["images"][:images]
        return item

    return get_item


class Loader:
    """A data loader that can save where it is, like Energon's; the state it hands out is its own, and goes on."""

    def __init__(self, dataset: Any, state: dict[str, int]):
        self.dataset, self.state = dataset, state

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        self.state["position"] += 1
        return torch.utils.data.default_collate([self.dataset[(7 * self.state["position"]) % len(self.dataset)]])

    def save_state(self) -> dict[str, int]:
        return self.state


def pretrain(config: Any, datasets_provider: Any, model_type: Any, forward_step: Any, *rest: Any, **kwargs: Any) -> Any:
    def provider(sizes: Any) -> Any:
        datasets = datasets_provider((OPTIONS.get("limit") or sizes[0], *(max(size, 1) for size in sizes[1:])))
        if "loader" not in OPTIONS:
            return datasets
        megatron.training.get_args().dataloader_save = OPTIONS["loader"]
        at = torch.load(OPTIONS["restore"])["dataloader_state_dict"] if "restore" in OPTIONS else {"position": 0}
        return Loader(datasets[0], at), None, None

    provider.is_distributed = not OPTIONS.get("broadcast")  # type: ignore[attr-defined]
    return original(config, provider, model_type, recording(forward_step), *rest, **kwargs)


def choose(models: Any, expression: str) -> None:
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = re.search(expression, name) is not None


def choosing(get_model: Any, train_step: Any) -> tuple[Any, Any]:
    def get(*arguments: Any, **keywords: Any) -> Any:
        models = get_model(*arguments, **keywords)
        choose(models, OPTIONS["trains"].get("0", ""))
        return models

    def step(forward_step: Any, iterator: Any, models: Any, *rest: Any, **keywords: Any) -> Any:
        now = str(megatron.training.get_args().curr_iteration + 1)
        if now in OPTIONS["trains"]:
            choose(models, OPTIONS["trains"][now])
        return train_step(forward_step, iterator, models, *rest, **keywords)

    return get, step


if "trains" in OPTIONS:
    loop = megatron.training.training
    loop.get_model, loop.train_step = choosing(loop.get_model, loop.train_step)
if "described" in OPTIONS:
    known: Any = importlib.import_module("dip_megatron.families.known")
    describe = known.describe_llava
    known.describe_llava = lambda kwargs, freeze, parallel: describe(kwargs, freeze | OPTIONS["described"], parallel)
if "--sequence-parallel" in sys.argv:
    # Upstream wants Transformer Engine's attention and norms there; on the host the local ones do, if Megatron is told
    # to sum the norms' gradients over tensor-parallel ranks.
    from megatron.core.models.multimodal import llava_model
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from tests.sequence_shards import allow_local_norms

    allow_local_norms()
    llava_model.HAVE_TE, llava_model.TEDotProductAttention = True, DotProductAttention
if "uneven" in OPTIONS:
    from dip_megatron.planner import balance, exchange_agreement

    def uneven(work: balance.Work, mode: balance.Mode = "free", goal: float = 1.0) -> balance.Assignment:
        after = work.replica.copy()
        after[-OPTIONS["uneven"] :] = 0
        worth = work.cost(work.replica)
        return balance.Assignment(after, after != work.replica, 9.0 + worth, worth)

    exchange_agreement.assign = uneven  # type: ignore[attr-defined]
if "node" in OPTIONS:
    host = os.uname()
    os.uname = lambda: os.uname_result((host.sysname, OPTIONS["node"], *host[2:]))  # type: ignore[assignment]
original = megatron.training.pretrain
megatron.training.pretrain = pretrain
documents.PackedDigitDocuments.__getitem__ = indexed(documents.PackedDigitDocuments.__getitem__)
sys.argv[0] = str(EXAMPLE / "pretrain_llava_digits.py")
runpy.run_path(sys.argv[0], run_name="__main__")
