# nanoGPT's recipe for Shakespeare by characters.
dropout = 0.2
batch_size = 64
max_iters = 5000
eval_interval = 250
eval_iters = 200
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
compile = True
