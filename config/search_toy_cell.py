# The toy cell on Fashion-MNIST with the published settings of DrNAS: 100 epochs; one GPU.
# python prepare.py --dataset=fashion_mnist
# python train_search.py config/search_toy_cell.py config/drnas.py
# Its table (4,096 architectures, test accuracy in %):
# best 91.63, median 90.54, the best of 100 random draws 91.43 in the mean.
include('shared/drnas_settings.py')
space = 'toy_cell'
out_dir = 'out/search_toy_cell'
dataset = 'fashion_mnist'
max_iters = 46800
eval_interval = 2340
nesterov = True
weight_decay = 5e-4
