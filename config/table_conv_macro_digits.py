# Every network of a reduced conv-macro space on digits, 256 of them with 3 seeds each, into
# assets/conv_macro_digits.csv: 20 minutes on a core.
# python train_base.py config/table_conv_macro_digits.py
# In several processes: the same with --seeds=[1], --seeds=[2] and --seeds=[3], at the same time.
include('shared/toy_conv_macro_digits.py')
table = 'assets/conv_macro_digits.csv'
seeds = [1, 2, 3]
batch_size = 32
max_iters = 300
val_portion = 0.0
weight_optimizer = 'adam'
learning_rate = 1e-3
weight_decay = 5e-4
warmup_iters = 0
min_lr = 1e-4
