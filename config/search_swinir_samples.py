# A small super-resolution space on two photographs that scikit-learn brings, on a laptop: no download, no GPU.
# python train_search.py config/search_swinir_samples.py config/drnas.py
space = 'swinir'
out_dir = 'out/search_swinir_samples'
dataset = 'sr_samples'
n_embd = [12, 24, 36]
n_rstb = [1, 2]
n_layer = [2, 3]
n_head = [2, 3]
patch = 24
batch_size = 4
max_iters = 300
eval_interval = 100
eval_iters = 4
flip = True
weight_optimizer = 'adam'
beta2 = 0.999
weight_decay = 0.0
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 30
arch_learning_rate = 1e-2
