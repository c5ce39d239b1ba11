# The published settings of DrNAS: 100 epochs of the half of the images that trains the weights.
batch_size = 64
train_portion = 0.5
max_iters = 39000
eval_interval = 1950
eval_iters = 200
weight_optimizer = 'sgd'
learning_rate = 0.025
min_lr = 1e-3
weight_decay = 3e-4
warmup_iters = 0
grad_clip = 5.0
arch_learning_rate = 3e-4
