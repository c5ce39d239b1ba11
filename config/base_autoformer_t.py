# Trains an architecture of AutoFormer-T on ImageNet at 224 pixels from scratch.
# 500 epochs, 1,024 images a step. What a search found, or the published network:
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_autoformer_t.py --arch=out/search_autoformer_t_drnas/arch.json
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_autoformer_t.py --space=autoformer --genotype=autoformer_t
include('shared/autoformer_imagenet.py')
out_dir = 'out/base_autoformer_t'
mlp_ratio = [3, 3.5, 4] # the published network has a 3
max_iters = 625500
eval_interval = 6255
val_portion = 0.0
warmup_iters = 25020
