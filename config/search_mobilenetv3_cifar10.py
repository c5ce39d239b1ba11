# A MobileNetV3 space of four narrow stages on 32 x 32 images: hours on a laptop, minutes on a GPU.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_mobilenetv3_cifar10.py config/drnas.py
include('shared/mobilenetv3_cifar10.py')
space = 'mobilenetv3'
out_dir = 'out/search_mobilenetv3_cifar10'
depth = [1, 2, 3]
stem_stride = 1
widths = [16, 24, 40, 80]
strides = [2, 1, 2, 2]
se = [0, 1, 0, 1]
hswish = [0, 0, 1, 1]
last_channels = 240
mix_channels = 320
train_portion = 0.5
max_iters = 19500
eval_interval = 1950
eval_iters = 100
warmup_iters = 400
arch_learning_rate = 1e-3
