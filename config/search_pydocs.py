# The quick search: a GPT for the characters of Python's own documentation, on two CPU cores in
# about 4 minutes.
# python train_search.py config/search_pydocs.py config/drnas.py
# Any other method: config/darts.py, darts2.py, gdas.py or spos.py in the place of drnas.py.
# Retrain what it found:
# python train_base.py config/base_pydocs.py --arch=out/search_pydocs_drnas/arch.json
include('shared/gpt2_block.py')
out_dir = 'out/search_pydocs'
dataset = 'pydocs'
n_layer = [2, 3, 4]
n_head = [2, 4, 8]
n_embd = [64, 96, 128]
mlp_ratio = [1, 2, 4]

batch_size = 16
block_size = 128
max_iters = 500
learning_rate = 2e-3
min_lr = learning_rate / 10
arch_learning_rate = 1e-2
