# OpenWebText with GPT-2's tokens: 951,892,141,473 architectures of 13 to 124 million parameters, for a node of GPUs.
# python prepare.py --dataset=openwebtext
# torchrun --standalone --nproc_per_node=8 train_search.py config/search_owt.py config/drnas.py
out_dir = 'out/search_owt'
dataset = 'openwebtext'
n_layer = [10, 11, 12]
n_head = [6, 8, 12]
n_embd = [192, 384, 768]
mlp_ratio = [2, 3, 4]
bias = False

train_portion = 0.8
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 40 # 12 * 40 * 1024 = 491,520 tokens a step; a multiple of the number of processes
max_iters = 7499
eval_interval = 250
eval_iters = 100
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
beta2 = 0.95
compile = True
arch_learning_rate = 3e-4
