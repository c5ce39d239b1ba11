# Retrains what a search on TinyStories found, on one to four GPUs.
# torchrun --standalone --nproc_per_node=4 train_base.py config/base_tinystories.py --arch=out/search_tinystories_drnas/arch.json
out_dir = 'out/base_tinystories'
batch_size = 12
gradient_accumulation_steps = 20 # 12 * 20 * 224 = 53,760 tokens a step
max_iters = 12000
eval_interval = 100
eval_iters = 100
val_portion = 0.01
dropout = 0.2
learning_rate = 5e-4
min_lr = 5e-5
warmup_iters = 100
beta2 = 0.99
compile = True
