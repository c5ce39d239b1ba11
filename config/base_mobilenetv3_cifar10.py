# Trains a network of the small MobileNetV3 space on CIFAR-10 from scratch, 100 epochs.
# python train_base.py config/base_mobilenetv3_cifar10.py --arch=out/search_mobilenetv3_cifar10_drnas/arch.json
include('shared/mobilenetv3_cifar10.py')
out_dir = 'out/base_mobilenetv3_cifar10'
max_iters = 70300
eval_interval = 3515
warmup_iters = 700
