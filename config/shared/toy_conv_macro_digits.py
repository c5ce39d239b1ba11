# A conv-macro space of 256 networks for 8 x 8 digits.
space = 'toy_conv_macro'
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
