# Trains a network of the conv-macro space on CIFAR-10 as those of its table were: Adam,
# 100 epochs, the rate nearly constant.
# python train_base.py config/base_toy_conv_macro.py --arch=out/search_toy_conv_macro_drnas/arch.json
include('shared/cifar10.py')
out_dir = 'out/base_toy_conv_macro'
batch_size = 64
max_iters = 78125
eval_interval = 3906
val_portion = 0.0
weight_optimizer = 'adam'
beta2 = 0.995
learning_rate = 3e-4
decay_lr = False
warmup_iters = 0
weight_decay = 5e-4
grad_clip = 0.0
