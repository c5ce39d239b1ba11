# Trains a network of the small MobileNetV3 space on CIFAR-10 from scratch, 100 epochs.
# python train_base.py config/base_mobilenetv3_cifar10.py --arch=out/search_mobilenetv3_cifar10_drnas/arch.json
out_dir = 'out/base_mobilenetv3_cifar10'
dataset = 'cifar10'
batch_size = 64
max_iters = 70300
eval_interval = 3515
crop = 4
flip = True
weight_optimizer = 'sgd'
nesterov = True
learning_rate = 0.05
min_lr = 0.0
weight_decay = 3e-4
warmup_iters = 700
grad_clip = 5.0
