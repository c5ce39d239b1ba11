# The toy cell on Fashion-MNIST with the published settings of DrNAS: 100 epochs of the half that trains the weights; one GPU.
# python prepare.py --dataset=fashion_mnist
# python train_search.py config/search_toy_cell.py config/drnas.py
# Its table (4,096 architectures, test accuracy in %): best 91.63, median 90.54, the best of 100 random draws 91.43 in the mean.
space = 'toy_cell'
out_dir = 'out/search_toy_cell'
dataset = 'fashion_mnist'
batch_size = 64
train_portion = 0.5
max_iters = 46800
eval_interval = 2340
eval_iters = 200
weight_optimizer = 'sgd'
nesterov = True
learning_rate = 0.025
min_lr = 1e-3
weight_decay = 5e-4
warmup_iters = 0
grad_clip = 5.0
arch_learning_rate = 3e-4
