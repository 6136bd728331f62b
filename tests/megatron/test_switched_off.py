"""What only Megatron's own schedules can make use of is switched off before it is validated."""

from __future__ import annotations

from argparse import Namespace
from enum import Enum

from dip_megatron.megatron.switched_off import switch_off


class Scope(Enum):
    none = 0
    block = 1


def test_each_that_is_on_is_told() -> None:
    args = Namespace(overlap_moe_expert_parallel_comm=True, delay_wgrad_compute=True, cuda_graph_impl="none")
    (line,) = switch_off(args)
    assert line.startswith("overlap_moe_expert_parallel_comm is switched off: ")
    assert not args.overlap_moe_expert_parallel_comm
    assert not args.delay_wgrad_compute
    assert switch_off(args) == []


def test_graphs_of_inference_go_with_those_of_training() -> None:
    provider = Namespace(cuda_graph_impl="transformer_engine", inference_cuda_graph_scope=Scope.block)
    (line,) = switch_off(provider)
    assert line.startswith("CUDA graphs are switched off: ")
    assert (provider.cuda_graph_impl, provider.inference_cuda_graph_scope) == ("none", Scope.none)
    flags = Namespace(cuda_graph_impl=None, enable_cuda_graph=True, inference_cuda_graph_scope="block")
    assert len(switch_off(flags)) == 1
    assert (flags.enable_cuda_graph, flags.inference_cuda_graph_scope) == (False, None)


def test_userbuffers_of_one_length() -> None:
    args = Namespace(tp_comm_overlap=True, decoder_tp_comm_overlap=True)
    (line,) = switch_off(args)
    assert line.startswith("tp_comm_overlap is switched off: ")
    assert (args.tp_comm_overlap, args.decoder_tp_comm_overlap) == (False, False)


def test_what_goes_by_megatrons_order_or_times_it() -> None:
    args = Namespace(
        fine_grained_activation_offloading=True, offload_modules=["core_attn"], log_straggler=True, cuda_graph_impl=None
    )
    offload, straggler = switch_off(args)
    assert "offload: true in --dip-config" in offload
    assert straggler.startswith("log_straggler is switched off: ")
    assert (args.fine_grained_activation_offloading, args.offload_modules, args.log_straggler) == (False, [], False)
    assert switch_off(args) == []
    unused = Namespace(fine_grained_activation_offloading=False, offload_modules=["core_attn"])
    assert switch_off(unused) == []
