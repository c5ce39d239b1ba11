# GPT-2 (124 million parameters) cut to 80 million. Its weights are sorted, what matters most in
# front. Smaller networks learn from the answers of the whole. Evolution then finds the best
# network within the budget. One GPU.
# --init_from=FOLDER takes a config.json and a model.safetensors from there.
# python prepare.py --dataset=openwebtext
# python train_search.py config/search_gpt2.py --target_params=80_000_000
include('shared/gpt2_block.py')
out_dir = 'out/search_gpt2'
dataset = 'openwebtext'
init_from = 'gpt2'
n_layer = [10, 11, 12]
n_head = [8, 10, 12]
n_embd = [576, 672, 768]
mlp_ratio = [2, 3, 4]
head_size = 64 # fewer heads are then the most important ones, whatever the width
bias = True

optimizer = 'spos'
subnets_per_step = 4 # the largest, two at random and the smallest
sandwich = True
inplace_distill = True
train_portion = 0.99
batch_size = 8
block_size = 1024
gradient_accumulation_steps = 8
max_iters = 2000
eval_interval = 200
learning_rate = 1e-4
min_lr = 1e-5
warmup_iters = 100
beta2 = 0.95
