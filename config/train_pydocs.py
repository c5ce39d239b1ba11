# A GPT of fixed sizes for the characters of Python's own documentation, on two CPU cores in some
# minutes.
# python train.py config/train_pydocs.py
out_dir = 'out/train_pydocs'
dataset = 'pydocs'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
max_iters = 2000
learning_rate = 2e-3
min_lr = learning_rate / 10
