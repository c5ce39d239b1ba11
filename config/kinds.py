# Kinds of block as choices, behind any search of a GPT's sizes; heads get a fixed size.
# python train_search.py config/search_tinystories_laptop.py config/kinds.py config/drnas.py
head_size = max(n_embd) // max(n_head)
norm = ['layernorm', 'rmsnorm']
position = ['learned', 'rope']
qk_norm = [False, True]
activation = ['gelu', 'relu2', 'swiglu']
n_kv_head = [1, 2, 0]
window = [block_size // 4, 0]
