"""GPT-2 whose layers have their own numbers and sizes of heads, config.heads: [(number, channels of
each)]. transformers loads it from beside the weights that export.py --format=huggingface wrote."""
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D


class GPT2HeadsConfig(GPT2Config):
    model_type = "gpt2_heads"


class GPT2HeadsLMHeadModel(GPT2LMHeadModel):
    config_class = GPT2HeadsConfig

    def __init__(self, config):
        super().__init__(config)
        for block, (n, size) in zip(self.transformer.h, config.heads, strict=True):
            attn = block.attn
            attn.num_heads, attn.head_dim, attn.split_size = n, size, n * size
            attn.scaling = size ** -0.5
            attn.c_attn = Conv1D(3 * n * size, config.n_embd)
            attn.c_proj = Conv1D(config.n_embd, n * size)
