# Trains a network of SwinIR's space on DIV2K by the recipe of SwinIR-light: Adam, 500,000 steps of 32 crops, halved 4 times.
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_swinir.py --arch=out/search_swinir_drnas/arch.json
# python prepare.py --dataset=set14 --path=FOLDER
# python analyze.py --out_dir=out/base_swinir --images=set14
out_dir = 'out/base_swinir'
dataset = 'div2k'
drop_path = 0.1
batch_size = 4
gradient_accumulation_steps = 8
max_iters = 500000
eval_interval = 5000
eval_iters = 100
val_portion = 0.02
flip = True
weight_optimizer = 'adam'
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.0
learning_rate = 2e-4
warmup_iters = 0
milestones = [250000, 400000, 450000, 475000]
grad_clip = 0.0
