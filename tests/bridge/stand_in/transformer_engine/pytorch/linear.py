from contextlib import nullcontext

import torch
from torch.nn.functional import linear

from .norms import norm_parameters, normalized


def _mappings():
    from megatron.core.tensor_parallel import mappings  # which is imported after Transformer Engine

    return mappings


class WeightGradStore:
    """What a linear asks in its backward: this one wants no weight gradient to wait."""

    def delay_wgrad_compute(self):
        return False


class _Product(torch.autograd.Function):
    """The product alone, as the linear's own backward has it: the weight gradient goes to the store, if that takes
    it."""

    @staticmethod
    def forward(ctx, x, weight, module):
        ctx.save_for_backward(x, weight)
        ctx.module = module
        return linear(x, weight)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        gradient = None
        if ctx.needs_input_grad[1]:
            if ctx.module.wgrad_store.delay_wgrad_compute():
                ctx.module.wgrad_store.put([x, grad_output], _weight_gradient)
            else:
                gradient, _, _ = _weight_gradient(x, grad_output)
        return grad_output.matmul(weight) if ctx.needs_input_grad[0] else None, gradient, None


def _weight_gradient(x, grad_output):
    with torch.no_grad():
        rows = grad_output.reshape(-1, grad_output.size(-1))
        return rows.t().matmul(x.reshape(-1, x.size(-1))), None, None


class _GroupedProduct(torch.autograd.Function):
    """As the grouped linear's own backward has it: where weight gradients go to the store, what autograd gets for them
    is memory that nothing has been written to yet."""

    @staticmethod
    def forward(ctx, x, splits, module, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.splits, ctx.module = splits, module
        return torch.cat([linear(rows, weight) for rows, weight in zip(x.split(splits), weights, strict=True)])

    @staticmethod
    def backward(ctx, grad_output):
        x, *weights = ctx.saved_tensors
        grads, rows = list(grad_output.split(ctx.splits)), list(x.split(ctx.splits))
        found = [None] * len(weights)
        if ctx.needs_input_grad[3]:
            found = [torch.full_like(weight, torch.nan) for weight in weights]
            if ctx.module.wgrad_store.delay_wgrad_compute():
                ctx.module.wgrad_store.put([rows, grads, found], _grouped_weight_gradients)
            else:
                _grouped_weight_gradients(rows, grads, found)
        grad_input = torch.cat([dy.matmul(weight) for dy, weight in zip(grads, weights, strict=True)])
        return grad_input if ctx.needs_input_grad[0] else None, None, None, *found


def _grouped_weight_gradients(rows, grads, found):
    with torch.no_grad():
        for x, dy, out in zip(rows, grads, found, strict=True):
            torch.matmul(dy.t(), x, out=out)
    return None, [None] * len(found), None


class _Base(torch.nn.Module):
    """The empty state of FP8 that every module of Transformer Engine with a GEMM has in checkpoints."""

    fp8 = fp8_calibration = False

    def __init__(self):
        super().__init__()
        self.fp8_meta = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms=1):
        pass

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        pass

    def _sizes(self, in_features, out_features, parallel_mode, tp_size, fuse_wgrad_accumulation):
        if fuse_wgrad_accumulation:
            raise NotImplementedError("the stand-in for Transformer Engine has no gradient_accumulation_fusion")
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.parallel_mode, self.tp_size = parallel_mode, tp_size

    def _make(self, number, bias, get_rng_state_tracker, rng_tracker_name, init_method, **where):
        """Weight and bias called ``weight{number}`` and ``bias{number}``."""
        weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **where))
        states = nullcontext()
        if get_rng_state_tracker is not None:
            states = get_rng_state_tracker().fork(*([rng_tracker_name] if rng_tracker_name else []))
        if weight.device.type != "meta":
            with torch.no_grad(), states:
                (init_method or torch.nn.init.xavier_normal_)(weight)
        made = {"weight": weight, "bias": None}
        if bias:
            made["bias"] = torch.nn.Parameter(torch.zeros(self.out_features, **where))
        for name, parameter in made.items():
            if parameter is not None:
                parameter.tensor_model_parallel = name == "weight" and self.parallel_mode is not None
                parameter.tensor_model_parallel |= self.parallel_mode == "column"
                parameter.partition_dim = 1 if name == "weight" and self.parallel_mode == "row" else 0
                parameter.partition_stride = 1
            self.register_parameter(f"{name}{number}", parameter)


class Linear(_Base):
    def __init__(self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
                 tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True,
                 return_bias=False, params_dtype=None, parallel_mode=None, device="cpu", **kwargs):  # fmt: skip
        super().__init__()
        self._sizes(in_features, out_features, parallel_mode, tp_size, fuse_wgrad_accumulation)
        self.use_bias, self.return_bias, self.sequence_parallel = bias, return_bias, sequence_parallel
        self.tp_group, self.fuse_wgrad_accumulation = tp_group, fuse_wgrad_accumulation
        self.wgrad_store, self.weight_names, self.bias_names = WeightGradStore(), ["weight"], ["bias"]
        self._make(
            "", bias, get_rng_state_tracker, rng_tracker_name, init_method, dtype=params_dtype, device=device
        )  # fmt: skip

    def forward(self, x, is_first_microbatch=None):
        output = self._multiplied(self._whole(x))
        if self.return_bias:
            return output, self.bias
        return output if self.bias is None else output + self.bias

    def _whole(self, x):
        """The input as all ranks of a column have it."""
        if self.parallel_mode != "column" or self.tp_size == 1:
            return x
        if self.sequence_parallel:
            return _mappings().gather_from_sequence_parallel_region(x, group=self.tp_group)
        return _mappings().copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _multiplied(self, x):
        output = _Product.apply(x, self.weight, self)
        if self.parallel_mode != "row" or self.tp_size == 1:
            return output
        if self.sequence_parallel:
            return _mappings().reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return _mappings().reduce_from_tensor_model_parallel_region(output, group=self.tp_group)


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, eps=1e-5, normalization="LayerNorm", sequence_parallel=False,
                 params_dtype=None, return_layernorm_output=False, zero_centered_gamma=False, device="cpu",
                 **kwargs):  # fmt: skip
        super().__init__(
            in_features, out_features, sequence_parallel=sequence_parallel, params_dtype=params_dtype, device=device,
            **kwargs,
        )  # fmt: skip
        self.return_layernorm_output, self.return_layernorm_output_gathered = return_layernorm_output, False
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.layer_norm_weight, self.layer_norm_bias = norm_parameters(
            in_features, normalization, zero_centered_gamma, sequence_parallel, dtype=params_dtype, device=device
        )

    def forward(self, x, is_first_microbatch=None):
        norm = (self.layer_norm_weight, self.layer_norm_bias, self.normalization, self.eps, self.zero_centered_gamma)
        normed = normalized(x, *norm)
        whole = self._whole(normed)
        output = self._multiplied(whole)
        if not self.return_bias and self.bias is not None:
            output = output + self.bias
        found = (output, self.bias) if self.return_bias else (output,)
        if self.return_layernorm_output:
            found = (*found, whole if self.return_layernorm_output_gathered else normed)
        return found if len(found) > 1 else output


class GroupedLinear(_Base):
    """One linear for each group of rows, as for the tokens of each expert."""

    def __init__(self, num_gemms, in_features, out_features, fuse_wgrad_accumulation=False, tp_size=1,
                 get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False,
                 params_dtype=None, parallel_mode=None, device="cpu", **kwargs):  # fmt: skip
        super().__init__()
        if tp_size > 1:
            raise NotImplementedError("the stand-in for Transformer Engine splits no grouped linears")
        self._sizes(in_features, out_features, parallel_mode, tp_size, fuse_wgrad_accumulation)
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        self.wgrad_store, self.fuse_wgrad_accumulation = WeightGradStore(), fuse_wgrad_accumulation
        for number in range(num_gemms):
            self._make(
                number, bias, get_rng_state_tracker, rng_tracker_name, init_method, dtype=params_dtype, device=device
            )

    def forward(self, x, m_splits, is_first_microbatch=None):
        biases = [getattr(self, f"bias{number}") for number in range(self.num_gemms)]
        splits, weights = [int(n) for n in m_splits], [getattr(self, f"weight{n}") for n in range(self.num_gemms)]
        output = _GroupedProduct.apply(x.reshape(-1, self.in_features), splits, self, *weights)
        if self.use_bias and not self.return_bias:
            output = torch.cat([rows + bias for rows, bias in zip(output.split(splits), biases, strict=True)])
        output = output.reshape(*x.shape[:-1], self.out_features)
        return (output, biases) if self.return_bias else output


class LayerNormMLP(torch.nn.Module):
    """None of the tests' models has one; PEFT asks of every layer whether it is."""
