# The largest network of the small MobileNetV3 space on digits, from which config/shrink_mobilenetv3_digits.py starts.
# python train.py config/train_mobilenetv3_digits.py
space = 'mobilenetv3'
out_dir = 'out/train_mobilenetv3_digits'
dataset = 'digits'
depth = 3
kernel_size = 7
expand = 6
stem_channels = 8
stem_stride = 1
widths = [16, 24, 32]
strides = [1, 2, 2]
se = [0, 1, 1]
hswish = [0, 1, 1]
last_channels = 96
mix_channels = 128
batch_size = 64
max_iters = 500
eval_interval = 100
val_portion = 0.25 # not more than the search trains on
crop = 1
weight_optimizer = 'sgd'
nesterov = True
learning_rate = 0.1
min_lr = 0.0
weight_decay = 3e-4
warmup_iters = 50
