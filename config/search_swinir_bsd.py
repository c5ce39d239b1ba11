# SwinIR's space at half of its size on 22 images of BSD100; one GPU, or an afternoon of a laptop.
# python prepare.py --dataset=pairs --path=FILE.zip/BSD100_part --name=bsd
# python train_search.py config/search_swinir_bsd.py config/drnas.py
include('shared/swinir_bsd.py')
space = 'swinir'
out_dir = 'out/search_swinir_bsd'
n_embd = [24, 36, 48]
n_rstb = [1, 2]
n_layer = [2, 4]
patch = 48
batch_size = 4
train_portion = 0.5
max_iters = 5000
eval_interval = 500
eval_iters = 10
min_lr = 1e-5
arch_learning_rate = 5e-3
