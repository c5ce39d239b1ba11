# Trains what the search in the small AutoFormer space found, on 8 x 8 digits, on a laptop.
# python train_base.py config/base_autoformer_digits.py --arch=out/search_autoformer_digits_drnas/arch.json
out_dir = 'out/base_autoformer_digits'
dataset = 'digits'
patch_size = 2
batch_size = 64
max_iters = 2000
eval_interval = 200
crop = 1
learning_rate = 4e-3
min_lr = 1e-5
warmup_iters = 100
weight_decay = 0.05
