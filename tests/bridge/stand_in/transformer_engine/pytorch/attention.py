from contextlib import nullcontext

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformer_engine_torch import shares  # type: ignore[import-not-found]


class DotProductAttention(torch.nn.Module):
    """Attention over ``sbhd``, ``bshd`` or packed (``thd``) queries, keys and values."""

    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0,
                 qkv_format="sbhd", attn_mask_type="causal", window_size=None, tp_size=1, get_rng_state_tracker=None,
                 softmax_scale=None, cp_group=None, **kwargs):  # fmt: skip
        super().__init__()
        self.cp_group = cp_group
        self.qkv_format, self.attn_mask_type = qkv_format, attn_mask_type
        self.window_size, self.softmax_scale, self.attention_dropout = window_size, softmax_scale, attention_dropout
        self.get_rng_state_tracker = get_rng_state_tracker
        self.num_splits = None

    def forward(self, query, key, value, attention_mask=None, qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None,
                cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, attn_mask_type=None, window_size=None,
                core_attention_bias_type="no_bias", core_attention_bias=None, **kwargs):  # fmt: skip
        """``[..., heads * channels]`` of the queries' leading dimensions. True in ``attention_mask`` forbids."""
        form, kind = qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type
        window = window_size or self.window_size or (-1, -1)
        if self.cp_group is not None:
            if (form, kind) not in (("sbhd", "causal"), ("thd", "padding_causal")) or window != (-1, -1):
                raise NotImplementedError("the stand-in shares only causal attention over context-parallel ranks")
            if form == "sbhd":
                return self._shared(query, key, value, [self.cp_group.size() * key.shape[0]])
            bounds = cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded
            query, key, value = (t[:, None] for t in (query, key, value))
            return self._shared(query, key, value, bounds.diff().tolist())[:, 0]
        if form == "thd":
            bounds_q = cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded
            bounds_kv = cu_seqlens_kv if cu_seqlens_kv_padded is None else cu_seqlens_kv_padded
            return self._packed(query, key, value, bounds_q.tolist(), bounds_kv.tolist(), kind, window)
        sequence_first = form == "sbhd"
        if sequence_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        output = self._attend(query, key, value, attention_mask, kind, window, core_attention_bias).flatten(2)
        return output.transpose(0, 1).contiguous() if sequence_first else output

    def _shared(self, query, key, value, lengths):
        """Of 2 N pieces of each sequence rank r has numbers r and 2 N - 1 - r, and gathers all keys and values."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        rows = [shares(lengths, ranks, r) for r in range(ranks)]
        order = torch.argsort(torch.cat(rows))
        keys, values = (gather_from_sequence_parallel_region(t, True, self.cp_group)[order] for t in (key, value))
        sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        forbidden = torch.arange(len(order)) > rows[rank][:, None]
        forbidden |= sequence != sequence[rows[rank]][:, None]
        query, keys, values = (t.transpose(0, 1) for t in (query, keys, values))
        output = self._attend(query, keys, values, forbidden, "arbitrary", (-1, -1), None).flatten(2)
        return output.transpose(0, 1).contiguous()

    def _packed(self, query, key, value, bounds_q, bounds_kv, kind, window):
        # Padding between sequences belongs to the sequence before it, as its last tokens: causal attention never
        # looks at them from real tokens.
        parts = [
            self._attend(query[None, a:b], key[None, c:d], value[None, c:d], None, kind, window, None)[0]
            for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_kv, bounds_kv[1:], strict=False)
        ]
        parts.append(query.new_zeros(query.shape[0] - bounds_q[-1], query.shape[1], value.shape[2]))
        return torch.cat(parts).flatten(1)

    def _attend(self, query, key, value, forbidden, kind, window, bias):
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # batch, heads, tokens, channels
        ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
        allowed = torch.ones_like(ahead, dtype=torch.bool)
        if "causal" in kind:
            allowed &= ahead <= 0
        if window[0] >= 0:
            allowed &= ahead >= -window[0]
        if window[1] >= 0:
            allowed &= ahead <= window[1]
        if forbidden is not None and kind not in ("causal", "no_mask"):
            allowed = allowed & ~forbidden
        scores = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill(~allowed, torch.finfo(q.dtype).min)
        dropout = self.attention_dropout if self.training else 0.0
        states = self.get_rng_state_tracker().fork() if dropout and self.get_rng_state_tracker else nullcontext()
        with states:
            output = scaled_dot_product_attention(
                q, k, v, scores if bias is None else scores + bias, dropout, scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        return output.transpose(1, 2)
