# TinyStories with GPT-2's tokens: 16,120,377 architectures of 25 to 88 million parameters, for
# one to four GPUs.
# python prepare.py --dataset=tinystories
# torchrun --standalone --nproc_per_node=4 train_search.py config/search_tinystories.py config/drnas.py
include('shared/tinystories.py')
include('shared/gpt2_block.py')
out_dir = 'out/search_tinystories'
dataset = 'tinystories'
n_layer = [5, 6, 7]
n_head = [6, 8, 12]
n_embd = [384, 576, 768]
mlp_ratio = [2, 3, 4]
bias = False

train_portion = 0.8
block_size = 224
max_iters = 6000
arch_learning_rate = 3e-4
