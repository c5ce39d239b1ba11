# The DARTS cells on CIFAR-10 with the published settings of DrNAS without partial channels:
# 50 epochs of half of the data; one GPU.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_darts.py config/drnas.py
# Published test errors of retrained cells in % (DrNAS' README):
# DrNAS 2.46, PC-DARTS 2.57, DARTS 2.76, GDAS 2.82.
include('shared/cifar10.py')
include('shared/drnas_settings.py')
space = 'darts'
out_dir = 'out/search_darts'
init_channels = 16
n_layer = 8
affine = False
max_iters = 19500
nesterov = True
min_lr = 0.0
