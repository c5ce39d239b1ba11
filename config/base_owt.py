# Retrains what a search on OpenWebText found, on a node of 8 GPUs.
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_owt.py --arch=out/search_owt_drnas/arch.json
out_dir = 'out/base_owt'
batch_size = 12
gradient_accumulation_steps = 40 # 12 * 40 * 1024 = 491,520 tokens a step
max_iters = 600000
eval_interval = 1000
eval_iters = 200
val_portion = 0.0005
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 0.1
beta2 = 0.95
compile = True
