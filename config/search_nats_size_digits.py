# NATS-Bench's sizes on 8 x 8 digits, on a laptop: no download, no GPU.
# python train_search.py config/search_nats_size_digits.py config/drnas.py
space = 'nats_size'
out_dir = 'out/search_nats_size_digits'
dataset = 'digits'
affine = False
batch_size = 64
max_iters = 500
eval_interval = 100
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 50
arch_learning_rate = 1e-2
