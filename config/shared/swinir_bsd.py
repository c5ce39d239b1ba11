# Super-resolution on 22 images of BSD100, for the search and for what it found.
dataset = 'bsd'
flip = True
weight_optimizer = 'adam'
beta2 = 0.999
weight_decay = 0.0
learning_rate = 5e-4
warmup_iters = 100
