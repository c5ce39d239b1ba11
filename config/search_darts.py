# The DARTS cells on CIFAR-10 with the published settings of DrNAS without partial channels: 50 epochs of half of the data; one GPU.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_darts.py config/drnas.py
# Published test errors of retrained cells in % (DrNAS' README): DrNAS 2.46, PC-DARTS 2.57, DARTS 2.76, GDAS 2.82.
space = 'darts'
out_dir = 'out/search_darts'
dataset = 'cifar10'
init_channels = 16
n_layer = 8
affine = False
batch_size = 64
train_portion = 0.5
max_iters = 19500
eval_interval = 1950
eval_iters = 200
crop = 4
flip = True
weight_optimizer = 'sgd'
nesterov = True
learning_rate = 0.025
min_lr = 0.0
weight_decay = 3e-4
warmup_iters = 0
grad_clip = 5.0
arch_learning_rate = 3e-4
