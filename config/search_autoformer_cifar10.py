# A small AutoFormer space of patches of 4 x 4 pixels on CIFAR-10 at its 32 x 32 pixels:
# 1,791,153 architectures, an hour on one CPU core.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_autoformer_cifar10.py config/drnas.py
include('shared/cifar10.py')
space = 'autoformer'
out_dir = 'out/search_autoformer_cifar10'
n_embd = [48, 72, 96]
n_layer = [4, 5, 6]
n_head = [2, 3, 4]
mlp_ratio = [2, 3, 4]
head_size = 32
patch_size = 4
rel_pos_clip = 7
batch_size = 64
train_portion = 0.8
max_iters = 4000
eval_interval = 400
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 200
weight_decay = 0.05
beta2 = 0.999
arch_learning_rate = 3e-3
