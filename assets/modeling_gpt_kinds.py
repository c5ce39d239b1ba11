"""A GPT whose layers may differ. transformers loads it from beside the weights that export.py
--format=huggingface wrote.

config.blocks has of every layer {"n_head", "n_kv_head", "head_size", "window", "n_hidden",
"activation"}; query head i reads head i % n_kv_head of keys and values, and window=0 is all tokens.
The other keys are the network's. Norms' eps is 1e-5, and there is no dropout.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

EPS = 1e-5
PLAIN = {"gelu": nn.GELU("tanh"), "exact_gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(),
         "mish": nn.Mish(), "relu2": lambda x: F.relu(x).square()}
GATED = {"geglu": nn.GELU("tanh"), "swiglu": nn.SiLU(), "reglu": nn.ReLU()} # act(W x) * (V x)


class GPTKindsConfig(PretrainedConfig):
    model_type = "gpt_kinds"
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer",
                     "max_position_embeddings": "n_positions"}


class Norm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.is_layernorm, self.n_rms = config.norm == "layernorm", config.n_rms
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        has_bias = self.is_layernorm and config.bias
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if has_bias else None

    def forward(self, x):
        if self.is_layernorm:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, EPS)
        # the RMS of the first n_rms channels: all of them, or fewer in a partial RMSNorm
        square = x[..., :self.n_rms].float().square().mean(-1, keepdim=True)
        return (x * torch.rsqrt(square + EPS)).to(x.dtype) * self.weight


def turned(x, position):
    """RoPE: channels 2i and 2i + 1 of x, (B, heads, T, size), turn by position * 10000^(-2i/size).
    position: (B, T)."""
    size = x.shape[-1]
    frequency = 10000 ** (-torch.arange(0, size, 2, device=x.device) / size)
    angle = position[:, None, :, None] * frequency # (B, 1, T, size / 2)
    a, b, cos, sin = x[..., ::2], x[..., 1::2], angle.cos(), angle.sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.qk_norm, self.rope = layer, config.qk_norm, config.position == "rope"
        block = config.blocks[layer]
        self.size, self.window = block["head_size"], block["window"]
        n, m = (block[name] * self.size for name in ("n_head", "n_kv_head"))
        self.sizes = n, m, m
        self.c_attn = nn.Linear(config.n_embd, n + 2 * m, bias=config.bias)
        self.c_proj = nn.Linear(n, config.n_embd, bias=config.bias)

    def forward(self, x, position, distance, seen, cache):
        heads = (t.unflatten(2, (-1, self.size)).transpose(1, 2)
                 for t in self.c_attn(x).split(self.sizes, dim=2))
        q, k, v = heads # (B, heads, T, size)
        if self.qk_norm:
            q, k = (F.rms_norm(t, (self.size,), eps=EPS) for t in (q, k))
        if self.rope:
            q, k = turned(q, position), turned(k, position)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v))
        if self.window:
            seen = seen & (distance < self.window)
        y = F.scaled_dot_product_attention(q, k, v, seen)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        n, self.activation = (config.blocks[layer][name] for name in ("n_hidden", "activation"))
        rows = 2 * n if self.activation in GATED else n
        self.c_fc = nn.Linear(config.n_embd, rows, bias=config.bias)
        self.c_proj = nn.Linear(n, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)
        if self.activation in PLAIN:
            return self.c_proj(PLAIN[self.activation](x))
        gate, up = x.chunk(2, dim=-1)
        return self.c_proj(GATED[self.activation](gate) * up)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = Norm(config), Attention(config, layer)
        self.ln_2, self.mlp = Norm(config), MLP(config, layer)

    def forward(self, x, *args):
        x = x + self.attn(self.ln_1(x), *args)
        return x + self.mlp(self.ln_2(x))


class GPTKindsForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = GPTKindsConfig

    def __init__(self, config):
        super().__init__(config)
        tables = dict(wte=nn.Embedding(config.vocab_size, config.n_embd)) # also the output's
        if config.position == "learned":
            tables["wpe"] = nn.Embedding(config.n_positions, config.n_embd)
        h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer = nn.ModuleDict(tables | dict(h=h, ln_f=Norm(config)))
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def forward(self, input_ids, attention_mask=None, labels=None, cache=None, past_key_values=None,
                **kwargs):
        """attention_mask: (B, past + T), 0 for tokens to ignore, on the left of a text. cache: the
        keys and values of past tokens, which generate() passes; its name depends on the version."""
        cache = past_key_values if cache is None else cache
        past = 0 if cache is None else cache.get_seq_length()
        B, T = input_ids.shape
        if attention_mask is None:
            attention_mask = input_ids.new_ones(B, past + T)
        position = (attention_mask.cumsum(1) - 1).clamp_min(0)[:, past:] # (B, T)
        x = self.transformer.wte(input_ids)
        if self.config.position == "learned":
            x = x + self.transformer.wpe(position)
        index = torch.arange(past + T, device=x.device)
        distance = index[past:, None] - index # (T, past + T): how far back a key is
        seen = (distance >= 0) & attention_mask.bool()[:, None, None, :] # (B, 1, T, past + T)
        for block in self.transformer.h:
            x = block(x, position, distance, seen, cache)
        logits, loss = F.linear(self.transformer.ln_f(x), self.transformer.wte.weight), None
        if labels is not None: # -100 is ignored
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)
