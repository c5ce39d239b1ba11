# The conv-macro space on CIFAR-10 with the published settings of DrNAS, but Adam; one GPU.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_toy_conv_macro.py config/drnas.py
# Its table (6,561 architectures, test accuracy in %):
# best 84.41, median 78.58, the best of 100 random draws 83.12 in the mean.
include('shared/cifar10.py')
include('shared/drnas_settings.py')
space = 'toy_conv_macro'
out_dir = 'out/search_toy_conv_macro'
weight_optimizer = 'adam'
beta1 = 0.9
beta2 = 0.995
learning_rate = 3e-4
min_lr = 1e-4
weight_decay = 5e-4
