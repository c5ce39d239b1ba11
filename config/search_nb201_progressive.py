# DrNAS' progressive search of NAS-Bench-201: 2 x 50 epochs, 1/4 and then 1/2 of the channels, 5 and then 3 operations.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_nb201_progressive.py config/drnas.py
# Published test accuracy of the cell found: 94.36%; the best of all has 94.37%.
space = 'nb201'
out_dir = 'out/search_nb201_progressive'
dataset = 'cifar10'
affine = False
partial_channels = 4
widen_to = 2
prune_keep = 3
batch_size = 64
train_portion = 0.5
max_iters = 39000
arch_warmup_iters = 3900 # 10 epochs of each half
eval_interval = 1950
eval_iters = 200
crop = 4
flip = True
weight_optimizer = 'sgd'
learning_rate = 0.025
min_lr = 1e-3
weight_decay = 3e-4
warmup_iters = 0
grad_clip = 5.0
arch_learning_rate = 3e-4
