# A small AutoFormer space of patches of 2 x 2 pixels on 8 x 8 digits, on a laptop: no download.
# python train_search.py config/search_autoformer_digits.py config/drnas.py
# python train_base.py config/base_autoformer_digits.py --arch=out/search_autoformer_digits_drnas/arch.json
include('shared/digits_search.py')
space = 'autoformer'
out_dir = 'out/search_autoformer_digits'
n_embd = [32, 48, 64]
n_layer = [2, 3, 4]
n_head = [2, 4]
mlp_ratio = [2, 3, 4]
head_size = 16
patch_size = 2
rel_pos_clip = 3
crop = 1
max_iters = 800
learning_rate = 4e-3
min_lr = 1e-4
weight_decay = 0.05
