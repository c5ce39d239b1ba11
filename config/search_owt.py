# OpenWebText with GPT-2's tokens: 951,892,141,473 architectures of 13 to 124 million parameters,
# for a node of GPUs.
# python prepare.py --dataset=openwebtext
# torchrun --standalone --nproc_per_node=8 train_search.py config/search_owt.py config/drnas.py
include('shared/owt.py')
include('shared/gpt2_block.py')
out_dir = 'out/search_owt'
dataset = 'openwebtext'
n_layer = [10, 11, 12]
n_head = [6, 8, 12]
n_embd = [192, 384, 768]
mlp_ratio = [2, 3, 4]
bias = False

train_portion = 0.8
block_size = 1024
max_iters = 7499
eval_interval = 250
eval_iters = 100
arch_learning_rate = 3e-4
