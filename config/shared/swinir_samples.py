# Super-resolution on two photographs, for the search and for what it found.
dataset = 'sr_samples'
batch_size = 4
eval_iters = 4
flip = True
weight_optimizer = 'adam'
beta2 = 0.999
weight_decay = 0.0
learning_rate = 1e-3
warmup_iters = 30
