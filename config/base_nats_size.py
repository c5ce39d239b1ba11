# Trains sizes of NATS-Bench on CIFAR-10 as its benchmark was: SGD with Nesterov's momentum,
# 90 epochs of 256 images a step.
# python train_base.py config/base_nats_size.py --arch=out/search_nats_size_drnas/arch.json
include('shared/cifar10.py')
out_dir = 'out/base_nats_size'
affine = True
batch_size = 256
max_iters = 17550
eval_interval = 1950
val_portion = 0.0
weight_optimizer = 'sgd'
nesterov = True
learning_rate = 0.1
min_lr = 0.0
warmup_iters = 0
weight_decay = 5e-4
grad_clip = 0.0
