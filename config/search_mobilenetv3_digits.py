# A small MobileNetV3 space on 8 x 8 digits, on a laptop: no download, no GPU.
# python train_search.py config/search_mobilenetv3_digits.py config/drnas.py
space = 'mobilenetv3'
out_dir = 'out/search_mobilenetv3_digits'
dataset = 'digits'
depth = [1, 2, 3]
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
crop = 1
weight_optimizer = 'sgd'
nesterov = True
learning_rate = 0.1
min_lr = 0.0
weight_decay = 3e-4
warmup_iters = 50
