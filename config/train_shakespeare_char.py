# nanoGPT's Shakespeare, by characters, on one GPU in some minutes; nanoGPT reports a validation loss of 1.4697.
# python prepare.py --dataset=shakespeare_char
# python train.py config/train_shakespeare_char.py
out_dir = 'out/train_shakespeare_char'
dataset = 'shakespeare_char'
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
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
