# DrNAS' progressive search of the DARTS cells: 2 x 25 epochs at full size, 1/6 and then 1/4 of the channels, 8 and then 4 operations.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_darts_progressive.py config/drnas.py
# Published test error of the retrained cell: 2.46% (0.03).
space = 'darts'
out_dir = 'out/search_darts_progressive'
dataset = 'cifar10'
init_channels = 36
n_layer = 20
affine = False
partial_channels = 6
widen_to = 4
prune_keep = 4
batch_size = 64
train_portion = 0.5
max_iters = 19500
arch_warmup_iters = 3900 # 10 epochs of each half
eval_interval = 1950
eval_iters = 200
crop = 4
flip = True
weight_optimizer = 'sgd'
learning_rate = 0.1
min_lr = 0.0
weight_decay = 3e-4
warmup_iters = 0
grad_clip = 5.0
arch_learning_rate = 6e-4
