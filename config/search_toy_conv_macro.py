# The conv-macro space on CIFAR-10 with the published settings of DrNAS: 100 epochs of the half that trains the weights; one GPU.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_toy_conv_macro.py config/drnas.py
# Its table (6,561 architectures, test accuracy in %): best 84.41, median 78.58, the best of 100 random draws 83.12 in the mean.
space = 'toy_conv_macro'
out_dir = 'out/search_toy_conv_macro'
dataset = 'cifar10'
batch_size = 64
train_portion = 0.5
max_iters = 39000
eval_interval = 1950
eval_iters = 200
crop = 4
flip = True
weight_optimizer = 'adam'
beta1 = 0.9
beta2 = 0.995
learning_rate = 3e-4
min_lr = 1e-4
weight_decay = 5e-4
warmup_iters = 0
grad_clip = 5.0
arch_learning_rate = 3e-4
