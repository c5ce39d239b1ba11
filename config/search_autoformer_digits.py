# A small AutoFormer space of patches of 2 x 2 pixels on 8 x 8 digits, on a laptop: no download, no GPU.
# python train_search.py config/search_autoformer_digits.py config/drnas.py
# python train_base.py config/base_autoformer_digits.py --arch=out/search_autoformer_digits_drnas/arch.json
space = 'autoformer'
out_dir = 'out/search_autoformer_digits'
dataset = 'digits'
n_embd = [32, 48, 64]
n_layer = [2, 3, 4]
n_head = [2, 4]
mlp_ratio = [2, 3, 4]
head_size = 16
patch_size = 2
rel_pos_clip = 3
batch_size = 64
crop = 1
max_iters = 800
eval_interval = 100
learning_rate = 4e-3
min_lr = 1e-4
warmup_iters = 50
weight_decay = 0.05
arch_learning_rate = 1e-2
