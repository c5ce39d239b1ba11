# Once-for-all's progressive shrinking on digits, in minutes on a laptop; then evolutionary search over all networks it has trained.
# python train.py config/train_mobilenetv3_digits.py
# python train_search.py config/shrink_mobilenetv3_digits.py
space = 'mobilenetv3'
out_dir = 'out/shrink_mobilenetv3_digits'
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
optimizer = 'spos'
inherit = 'out/train_mobilenetv3_digits'
teacher = 'out/train_mobilenetv3_digits'
shrink = 'kernel_size=3, depth=2, depth=1, expand=4, expand=3'
subnets_per_step = 2
train_portion = 0.8
batch_size = 64
max_iters = 1000
eval_interval = 200
crop = 1
weight_optimizer = 'sgd'
nesterov = True
learning_rate = 0.03
min_lr = 0.0
weight_decay = 3e-4
warmup_iters = 10
