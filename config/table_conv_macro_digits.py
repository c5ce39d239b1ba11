# Every network of a reduced conv-macro space on digits, 256 of them with 3 seeds, into assets/conv_macro_digits.csv: 20 minutes on a core.
#   python train_base.py config/table_conv_macro_digits.py
# In several processes: the same with --seeds=[1], --seeds=[2] and --seeds=[3], at the same time.
space = 'toy_conv_macro'
table = 'assets/conv_macro_digits.csv'
seeds = [1, 2, 3]
channels_1 = [4, 16]
channels_2 = [8, 32]
channels_3 = [8, 32]
channels_4 = [16, 64]
kernel_size = [3, 5]
last_channels = 32
last_kernel_size = 3
last_padding = 1
fc = 64
he_init = True
dropout = 0.2
batch_size = 32
max_iters = 300
val_portion = 0.0
weight_optimizer = 'adam'
learning_rate = 1e-3
weight_decay = 5e-4
warmup_iters = 0
min_lr = 1e-4
