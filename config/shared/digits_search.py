# A search on 8 x 8 digits, for a laptop: no download, no GPU.
dataset = 'digits'
batch_size = 64
max_iters = 500
eval_interval = 100
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 50
arch_learning_rate = 1e-2
