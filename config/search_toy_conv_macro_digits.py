# A conv-macro space of 256 networks on 8 x 8 digits, on a laptop: no download, no GPU.
# python train_search.py config/search_toy_conv_macro_digits.py config/drnas.py
space = 'toy_conv_macro'
out_dir = 'out/search_toy_conv_macro_digits'
dataset = 'digits'
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
batch_size = 64
max_iters = 500
eval_interval = 100
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 50
arch_learning_rate = 1e-2
