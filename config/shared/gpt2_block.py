# GPT-2's block, which the published spaces of sizes have.
head_size = 0
norm = 'layernorm'
position = 'learned'
qk_norm = False
residual = 'pre'
activation = 'gelu'
n_kv_head = 0
window = 0
