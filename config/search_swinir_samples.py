# A small super-resolution space on two photographs that scikit-learn brings, on a laptop:
# no download, no GPU.
# python train_search.py config/search_swinir_samples.py config/drnas.py
include('shared/swinir_samples.py')
space = 'swinir'
out_dir = 'out/search_swinir_samples'
n_embd = [12, 24, 36]
n_rstb = [1, 2]
n_layer = [2, 3]
n_head = [2, 3]
patch = 24
max_iters = 300
eval_interval = 100
min_lr = 1e-4
arch_learning_rate = 1e-2
