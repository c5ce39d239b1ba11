# SwinIR's space on the 800 images of DIV2K, enlarged twice, 32 crops a step; a node of 8 GPUs.
# python prepare.py --dataset=div2k --path=FOLDER
# torchrun --standalone --nproc_per_node=8 train_search.py config/search_swinir.py config/drnas.py
# SwinIR-light, the largest network of the space, has 38.14 dB on Set5 and 33.86 dB on Set14
# (Liang et al. 2021).
include('shared/swinir_div2k.py')
space = 'swinir'
out_dir = 'out/search_swinir'
scale = 2
patch = 64
train_portion = 0.8
eval_iters = 20
arch_learning_rate = 5e-4
arch_weight_decay = 1e-3
