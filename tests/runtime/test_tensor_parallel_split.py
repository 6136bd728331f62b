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
    from dip_megatron.runtime.layer_context import LayerContext
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
    mode = LayerContext()
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
    """Shapes of what the two linears' W waits with to be gathered, bytes that wait in host memory, and gradients: of a
    store that waits, of one whose inputs wait in host memory, and of one that doesn't wait."""
    initialize(1, world)
    from megatron.core import tensor_parallel

    from dip_megatron.families.shared import deferred_linear
    from dip_megatron.runtime.deferred import AtOnce, WeightGradients
    from dip_megatron.runtime.layer_context import LayerContext
    from dip_megatron.runtime.offload import OffloadedActivations

    settings = config(Case((0,)), 1, 1)
    settings.tensor_model_parallel_size, settings.sequence_parallel = world, True
    settings.gradient_accumulation_fusion = False
    common = {"config": settings, "init_method": torch.nn.init.normal_, "bias": False}
    torch.manual_seed(1)
    up = tensor_parallel.ColumnParallelLinear(32, 48, gather_output=False, **common)
    down = tensor_parallel.RowParallelLinear(48, 32, input_is_parallel=True, skip_bias_add=False, **common)
    model, mode = torch.nn.Sequential(up, down), LayerContext()
    deferred_linear.install(model, mode)
    hidden = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(rank))
    found = []
    hosts = WeightGradients()
    for store, own in (
        (WeightGradients(), None), (hosts, hosts.hosting(OffloadedActivations())), (AtOnce(), None),
    ):  # fmt: skip
        with mode.stage(own or store):
            output, _ = down(up(hidden)[0])
            (output * torch.arange(output.numel(), dtype=torch.float32).view_as(output)).sum().backward()
        sizes = [_waiting(work) for work in store._work]
        host = store.host_bytes
        store.compute()
        found.append((sizes, host, [_gradient_of(p) for p in model.parameters()]))
    return found


def _waiting(work):
    part = work.operands[work.gathered[0]]
    return tuple(getattr(part, "host", part).shape)


def _gradient_of(parameter):
    gradient, parameter.grad = parameter.grad, None
    return gradient


def test_parts_wait(pair):
    """Under sequence parallelism W waits with this rank's part of the row's output gradient and of the column's input,
    in the order of B; stores that compute at once, or leave inputs (the row's has all rows, and half of the columns) in
    host memory, give the same gradients."""
    for (sizes, on_device, waited), (hosted, in_host, fetched), (none, _, at_once) in pair.run(held):
        assert sizes == hosted == [(3, 2, 32), (3, 2, 32)]
        assert none == []
        assert (on_device, in_host) == (0, 4 * (6 * 2 * 24 + 3 * 2 * 32))
        for x, y, z in zip(waited, fetched, at_once, strict=True):
            assert torch.equal(x, z)
            assert torch.equal(y, z)
            assert x.abs().max() > 0


def transformer_engines(rank, world, mode_of_linear, hosted):
    """A linear that puts what Transformer Engine's would into its store: its weight gradient at once, and in W, with
    its input in host memory or not; the shape of what waits to be gathered, and bytes in host memory."""
    initialize(1, world)
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    from dip_megatron.families.shared import deferred_te
    from dip_megatron.runtime.deferred import WeightGradients
    from dip_megatron.runtime.layer_context import LayerContext
    from dip_megatron.runtime.offload import OffloadedActivations

    linear = torch.nn.Linear(4, 3, bias=False)
    linear.weight_names, linear.bias_names, linear.use_bias = ["weight"], [], False
    linear.fuse_wgrad_accumulation, linear.wgrad_store = False, None
    linear.sequence_parallel, linear.parallel_mode = True, mode_of_linear
    linear.tp_group = get_tensor_model_parallel_group()
    mode, store = LayerContext(), WeightGradients()
    deferred_te.install(linear, mode)
    whole = torch.Generator().manual_seed(3)  # both operands as all ranks have them once one has been gathered
    x, dy = torch.randn(6, 4, generator=whole), torch.randn(6, 3, generator=whole)
    with mode.stage(store):
        given = linear.wgrad_store.hosting(OffloadedActivations()) if hosted else linear.wgrad_store
        assert given.delay_wgrad_compute()
        given.put([x, dy], lambda a, b: (b.t() @ a, None, None))
    shapes, host = [_waiting(work) for work in store._work], store.host_bytes
    store.compute()
    return shapes, host, linear.weight.grad, dy.t() @ x


@pytest.mark.parametrize(("kind", "hosted", "shape", "bytes_there"), [
    ("column", False, (3, 4), 0), ("column", True, (3, 4), 48), ("row", False, (3, 3), 0), ("row", True, (3, 3), 96),
])  # fmt: skip
def test_transformer_engines_parts_wait(pair, kind, hosted, shape, bytes_there):
    for shapes, host, split, whole in pair.run(transformer_engines, kind, hosted):
        assert (shapes, host) == ([shape], bytes_there)
        assert torch.equal(split, whole)
