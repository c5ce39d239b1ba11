# Trains DARTS cells on CIFAR-10 by the published recipe: 20 cells of 36 channels, 600 epochs,
# an auxiliary head, drop path and cutout. What a search found, or a published cell:
# python train_base.py config/base_darts.py --arch=out/search_darts_drnas/arch.json
# python train_base.py config/base_darts.py --space=darts --genotype=DARTS_V2
include('shared/cifar10.py')
out_dir = 'out/base_darts'
init_channels = 36
n_layer = 20
affine = True
partial_channels = 1
pool_norm = False
auxiliary = 0.4
drop_path = 0.2
cutout = 16
batch_size = 96
max_iters = 312500
eval_interval = 5208
val_portion = 0.0
weight_optimizer = 'sgd'
learning_rate = 0.025
min_lr = 0.0
warmup_iters = 0
weight_decay = 3e-4
grad_clip = 5.0
