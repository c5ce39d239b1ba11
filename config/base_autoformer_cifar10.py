# Trains what the search in the small AutoFormer space found on CIFAR-10, 100 epochs; one GPU.
# python train_base.py config/base_autoformer_cifar10.py --arch=out/search_autoformer_cifar10_drnas/arch.json
include('shared/cifar10.py')
out_dir = 'out/base_autoformer_cifar10'
batch_size = 128
max_iters = 39000
eval_interval = 1950
val_portion = 0.0
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 1950
weight_decay = 0.05
beta2 = 0.999
