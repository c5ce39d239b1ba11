# DrNAS' progressive search of the DARTS cells, 2 x 25 epochs at full size: 1/6 and then 1/4 of
# the channels, 8 and then 4 operations.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_darts_progressive.py config/drnas.py
# Published test error of the retrained cell: 2.46% (0.03).
include('search_darts.py')
out_dir = 'out/search_darts_progressive'
init_channels = 36
n_layer = 20
partial_channels = 6
widen_to = 4
prune_keep = 4
arch_warmup_iters = 3900 # 10 epochs of each half
nesterov = False
learning_rate = 0.1
arch_learning_rate = 6e-4
