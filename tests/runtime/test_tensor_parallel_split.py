"""Linears split over tensor-parallel ranks: B and W together give what Megatron's backward gives."""

from __future__ import annotations

import pytest
import torch

from tests.processes import Team
from tests.runtime.llava_case import Case, config, initialize


def both(rank, world, sequence_parallel, fused):
    """Gradients of input and parameters, unsplit and split, and whether a weight had one between B and W."""
    initialize(1, world)
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import layers

    from dip_megatron.families.shared import deferred_linear
    from dip_megatron.runtime.deferred import WeightGradients
    from dip_megatron.runtime.modes import StageMode
    from tests.runtime.split_case import FusedOnHost

    layers._grad_accum_fusion_available, layers.fused_weight_gradient_mlp_cuda = fused, FusedOnHost
    settings = config(Case((0,)), 1, 1)
    settings.tensor_model_parallel_size, settings.sequence_parallel = world, sequence_parallel
    settings.gradient_accumulation_fusion = fused
    common = {"config": settings, "init_method": torch.nn.init.normal_, "bias": True}
    torch.manual_seed(1)
    table = layers.VocabParallelEmbedding(
        64, 32, init_method=torch.nn.init.normal_, config=settings, reduce_scatter_embeddings=sequence_parallel
    )
    up = tensor_parallel.ColumnParallelLinear(32, 48, gather_output=False, **common)
    down = tensor_parallel.RowParallelLinear(48, 32, input_is_parallel=True, skip_bias_add=False, **common)
    model = torch.nn.Sequential(table, up, down)
    mode = StageMode()
    deferred_linear.install(model, mode)
    assert deferred_linear.undeferrable(model) == []
    for p in model.parameters():
        p.main_grad = torch.zeros_like(p)
    found = []
    for split in (False, True):
        store = WeightGradients() if split else None
        ids = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(2))
        with mode.stage(store):
            hidden = table(ids)
            hidden = hidden if sequence_parallel else hidden.transpose(0, 1).contiguous()
            inner, _ = up(hidden)
            output, _ = down(torch.tanh(inner))
            weights = torch.arange(output.numel(), dtype=torch.float32).view_as(output)
            (output * weights).sum().backward()
        early = up.weight.grad is not None or bool(up.weight.main_grad.any())
        if store is not None:
            store.compute()
        found.append(([_gradient(p) for p in model.parameters()], early))
    return found


def _gradient(parameter):
    """What has been accumulated, by autograd or beside it; and start over."""
    total = parameter.main_grad.clone()
    if parameter.grad is not None:
        total += parameter.grad
    parameter.main_grad.zero_()
    parameter.grad = None
    return total


@pytest.fixture(scope="module")
def pair():
    processes = Team(2)
    yield processes
    processes.close()


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_split_equals_unsplit(pair, sequence_parallel, fused):
    for (whole, early), (split, too_early) in pair.run(both, sequence_parallel, fused):
        assert early
        assert not too_early
        assert all(g.abs().max() > 0 for g in whole)
        for a, b in zip(split, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5 * float(b.abs().max()))


def held(rank, world):
    """Bytes that the two linears' W waits with, and what a store that doesn't wait makes of the same backward."""
    initialize(1, world)
    from megatron.core import tensor_parallel

    from dip_megatron.families.shared import deferred_linear
    from dip_megatron.runtime.deferred import AtOnce, WeightGradients
    from dip_megatron.runtime.modes import StageMode

    settings = config(Case((0,)), 1, 1)
    settings.tensor_model_parallel_size, settings.sequence_parallel = world, True
    settings.gradient_accumulation_fusion = False
    common = {"config": settings, "init_method": torch.nn.init.normal_, "bias": False}
    torch.manual_seed(1)
    up = tensor_parallel.ColumnParallelLinear(32, 48, gather_output=False, **common)
    down = tensor_parallel.RowParallelLinear(48, 32, input_is_parallel=True, skip_bias_add=False, **common)
    model, mode = torch.nn.Sequential(up, down), StageMode()
    deferred_linear.install(model, mode)
    hidden = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(rank))
    found = []
    for store in (WeightGradients(), AtOnce()):
        with mode.stage(store):
            output, _ = down(up(hidden)[0])
            (output * torch.arange(output.numel(), dtype=torch.float32).view_as(output)).sum().backward()
        sizes = [None if work.part is None else tuple(work.part.shape) for work in store._work]
        store.compute()
        found.append((sizes, [_gradient_of(p) for p in model.parameters()]))
    return found


def _gradient_of(parameter):
    gradient, parameter.grad = parameter.grad, None
    return gradient


def test_parts_wait(pair):
    """Under sequence parallelism W waits with this rank's part of the row's output gradient and of the column's input,
    in the order of B; a store that computes at once gives the same gradients."""
    for (sizes, waited), (none, at_once) in pair.run(held):
        assert sizes == [(3, 2, 32), (3, 2, 32)]
        assert none == []
        assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(waited, at_once, strict=True))


def transformer_engines(rank, world, mode_of_linear):
    """A linear that puts what Transformer Engine's would into its store: its weight gradient at once, and in W; the
    shape of what waits."""
    initialize(1, world)
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    from dip_megatron.families.shared import deferred_te
    from dip_megatron.runtime.deferred import WeightGradients
    from dip_megatron.runtime.modes import StageMode

    linear = torch.nn.Linear(4, 3, bias=False)
    linear.weight_names, linear.bias_names, linear.use_bias = ["weight"], [], False
    linear.fuse_wgrad_accumulation, linear.wgrad_store = False, None
    linear.sequence_parallel, linear.parallel_mode = True, mode_of_linear
    linear.tp_group = get_tensor_model_parallel_group()
    mode, store = StageMode(), WeightGradients()
    deferred_te.install(linear, mode)
    whole = torch.Generator().manual_seed(3)  # both operands as all ranks have them once one has been gathered
    x, dy = torch.randn(6, 4, generator=whole), torch.randn(6, 3, generator=whole)
    with mode.stage(store):
        assert linear.wgrad_store.delay_wgrad_compute()
        linear.wgrad_store.put([x, dy], lambda a, b: (b.t() @ a, None, None))
    shapes = [None if work.part is None else tuple(work.part.shape) for work in store._work]
    store.compute()
    return shapes, linear.weight.grad, dy.t() @ x


@pytest.mark.parametrize(("kind", "shape"), [("column", (3, 4)), ("row", (3, 3))])
def test_transformer_engines_parts_wait(pair, kind, shape):
    for shapes, split, whole in pair.run(transformer_engines, kind):
        assert shapes == [shape]
        assert torch.equal(split, whole)
