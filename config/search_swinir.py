# SwinIR's space on the 800 images of DIV2K, twice enlarged, in batches of 32 crops; one node of 8 GPUs.
# python prepare.py --dataset=div2k --path=FOLDER
# torchrun --standalone --nproc_per_node=8 train_search.py config/search_swinir.py config/drnas.py
# SwinIR-light, the largest network of the space, has 38.14 dB on Set5 and 33.86 dB on Set14 (Liang et al. 2021).
space = 'swinir'
out_dir = 'out/search_swinir'
dataset = 'div2k'
scale = 2
patch = 64
batch_size = 4
gradient_accumulation_steps = 8
train_portion = 0.8
max_iters = 500000
eval_interval = 5000
eval_iters = 20
flip = True
weight_optimizer = 'adam'
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.0
learning_rate = 2e-4
warmup_iters = 0
milestones = [250000, 400000, 450000, 475000]
grad_clip = 0.0
arch_learning_rate = 5e-4
arch_weight_decay = 1e-3
