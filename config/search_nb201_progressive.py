# DrNAS' progressive search of NAS-Bench-201, 2 x 50 epochs: 1/4 and then 1/2 of the channels,
# 5 and then 3 operations.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_nb201_progressive.py config/drnas.py
# Published test accuracy of the cell found: 94.36%; the best of all has 94.37%.
include('search_nb201.py')
out_dir = 'out/search_nb201_progressive'
partial_channels = 4
widen_to = 2
prune_keep = 3
arch_warmup_iters = 3900 # 10 epochs of each half
