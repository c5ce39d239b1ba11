# TinyStories with GPT-2's tokens, small enough for two CPU cores: about 10 minutes.
# python prepare.py --dataset=tinystories
# python train_search.py config/search_tinystories_laptop.py config/drnas.py
# Retrain what it found:
# python train_base.py config/base_tinystories_laptop.py --arch=out/search_tinystories_laptop_drnas/arch.json
include('shared/gpt2_block.py')
out_dir = 'out/search_tinystories_laptop'
dataset = 'tinystories'
n_layer = [2, 3, 4]
n_head = [2, 4, 8]
n_embd = [64, 128, 192]
mlp_ratio = [1, 2, 4]

train_portion = 0.8
batch_size = 8
block_size = 128
max_iters = 500
eval_interval = 100
eval_iters = 10
learning_rate = 2e-3
min_lr = learning_rate / 10
arch_learning_rate = 1e-2
